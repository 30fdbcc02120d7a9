"""A fast part of the fault bench: whoever changes the trainer or the analyser must not lose these."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT

BENCH = ROOT / "benchmarks" / "faults"
needs_analyser = pytest.mark.skipif(not (ROOT / "analyze_nan_debug.py").is_file(), reason="no analyze_nan_debug.py")
# File, loss, state, control. The whole bench takes an hour.
SAMPLE = ("F01", "F26", "F52", "C9")


def bench(*words) -> subprocess.CompletedProcess:
    """Run the bench as a user does."""
    return subprocess.run(
        [sys.executable, str(BENCH / "run.py"), *words], capture_output=True, text=True, cwd=ROOT, timeout=600
    )


@needs_analyser
def test_faults_of_each_kind_are_detected_and_explained_and_no_control_is_blamed(tmp_path):
    done = bench("--only", ",".join(SAMPLE), "--jobs", "2", "--json", str(tmp_path / "scores.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())["faults"]
    assert tuple(score["id"] for score in scores) == SAMPLE and all(score["detected"] for score in scores)
    judged = [[score[name] for name in ("cause", "place", "fix")] for score in scores]
    assert not any(False in marks for marks in judged), done.stdout
    assert judged[0] == judged[2] == [True, True, True] and judged[-1] == [None, None, None]


def test_every_fault_of_the_taxonomy_is_there_with_a_truth(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from catalog import FAULTS
    from sources import marked_lines

    ids = [fault.id for fault in FAULTS]
    assert len(set(ids)) == len(ids)
    assert {f"F{n:02d}" for n in range(1, 61)} | {f"C{n}" for n in range(1, 11)} <= set(ids)
    for fault in FAULTS:
        places = [place for truth in fault.truths for place in truth.places]
        assert not any(place.code for place in places) or marked_lines(fault.plugins), fault.id
        for name, source in fault.plugins.items():
            compile(source, f"{fault.id}/{name}", "exec")
        if fault.is_control:
            assert not fault.truths and not fault.status
        else:
            assert fault.truths or fault.said or fault.check or fault.id == "F38"  # F38 diverges and stays finite


def test_every_entry_has_its_fields_in_one_order_and_the_contents_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from catalog import FAULTS, FILES
    from contents import page
    from fault import Fault

    fields = [field.name for field in dataclasses.fields(Fault)]
    assert sum(len(file.FAULTS) for file in FILES) == len(FAULTS)
    assert {Path(file.__file__).name for file in FILES} == {
        path.name for path in (BENCH / "catalog").glob("*.py") if path.stem not in ("__init__", "shared")
    }
    for file in FILES:
        tree = ast.parse(Path(file.__file__).read_text())
        (entries,) = [n.value.elts for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "FAULTS"]
        for entry in entries:
            place = f"{file.__name__}:{entry.lineno}"
            assert entry.func.id == "Fault" and not entry.args, place
            names = [word.arg for word in entry.keywords]
            assert names == [name for name in fields if name in names], place
    current = (BENCH / "README.md").read_text()
    assert current == page() + "\n", "run: python benchmarks/faults/contents.py > benchmarks/faults/README.md"


def test_an_unknown_fault_is_refused():
    done = bench("--only", "F99")
    assert done.returncode == 1 and "no such fault: F99" in done.stderr


def test_names_of_operations_are_compared_without_their_trimmings(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from judge import plain_op

    names = {"aten.sqrt.default": "sqrt", "SqrtBackward0": "sqrt", "NllLossBackward0": "nll_loss", "torch.div_": "div"}
    assert {name: plain_op(name) for name in names} == names
