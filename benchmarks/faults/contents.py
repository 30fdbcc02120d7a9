"""The table of contents of the catalogue: `python benchmarks/faults/contents.py > benchmarks/faults/README.md`."""

from catalog import FILES

HEAD = """# Faults of the bench

Made by `python benchmarks/faults/contents.py > benchmarks/faults/README.md`.
`python benchmarks/faults/run.py --only F03,C2` puts faults into runs of the trainer and scores what it and the analysis
say of them; without `--only` it takes all, in less than an hour on two cores.

The analysis was built on the faults F. It was not tuned on the faults H, whose mechanisms and code shapes differ.
The faults N, and the controls from C30, were written by somebody who had not read the analysis.
The faults P are what plug-ins bring with them: draws, memories, exceptions; the analysis was mended on them.
The faults R are reports from public trackers, made small; the address of each stands above its entry.
The faults X, and the controls from C42, were written by another who had not read it, as users' plug-ins have them.
Of the controls C nothing may be said. The compounds K are several faults at once.

To add one, write an entry `Fault(...)` in the file of its kind: the fields in the order of `fault.py`, first how it is
put into a run, then what must come of it. Code of a plug-in stands above it, made from a template of `sources.py`; the
line at fault ends with `#!`. What several files use stands in `shared.py`."""


def page() -> str:
    """Make README.md: a section for each file of the catalogue, a line for each fault."""
    lines = [HEAD]
    for file in FILES:
        lines += ["", f"## `{file.__name__.replace('.', '/')}.py`", file.__doc__.splitlines()[0], ""]
        lines += ["| fault | what |", "| --- | --- |"]
        lines += [f"| {fault.id} | {fault.title.replace('|', chr(92) + '|')} |" for fault in file.FAULTS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
