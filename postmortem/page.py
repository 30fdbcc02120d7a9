"""The report of NaN dumps as one self-contained HTML page: ``render(analyses)``.

An analysis has the attributes path, dump, verdict, summary and activations of ``postmortem.analysis.Analysis``. A dump
is untrusted: every string of it is escaped, every key may be missing, and the page can neither load nor run anything.
"""

import re

import yaml

from corpus.tars import ENDING
from errors import plural
from postmortem.charts import number, number_text
from postmortem.panels import (
    activations,
    as_dict,
    as_list,
    data_of_batch,
    gradients,
    history,
    rows_at_fault,
)
from postmortem.report import REPLAYED, parameter_title
from utils import plain_names
from web.charts import escape, plain
from web.report import document, section, terms

CAUSES = {
    "input": "an audio file",
    "augmentation": "a noise file, an impulse response or the mixing",
    "label": "a label outside the classes",
    "frontend": "the features, from a sound waveform",
    "model_forward": "a layer, from finite input",
    "model_backward": "a gradient; the forward pass is finite",
    "loss": "the loss head",
    "precision": "16-bit arithmetic; finite in fp32",
    "optimizer": "learning rate, schedule or another setting of the optimizer",
    "state": "a weight, buffer or moment that was bad before the step",
    "distributed": "another rank",
    "environment": "a rehearsal or the machine; the replay is finite",
    "evaluation": "evaluation only",
    "unknown": "no known cause fits",
}

SCRIPT = """
for (const button of document.querySelectorAll("button")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const code = button.parentElement.querySelector("code");
    getSelection().selectAllChildren(code);
    navigator.clipboard?.writeText(code.textContent).then(() => (button.textContent = "Copied"));
  });
}
"""


def render(analyses) -> str:
    """Return one HTML page that shows for each dump what happened, where, and which fix works."""
    analyses = list(analyses)
    runs = sorted({_run(a) for a in analyses})
    title = "NaN report: " + (", ".join(runs[:3]) + (", ..." if len(runs) > 3 else "") if runs else "no dump")
    articles = plain_names("".join(_article(a, i) for i, a in enumerate(analyses, 1)))
    return document(title, _index(analyses) + (articles or "<p>No dump was found.</p>"), SCRIPT)


def _run(analysis) -> str:
    """The run's folder; a dump lies in its debug_nan/."""
    return str(as_dict(analysis.dump.get("config")).get("save_path") or analysis.path.parent.parent)


def _name(analysis) -> str:
    dump = analysis.dump
    if not dump:
        return f"Lost scores, {analysis.path.name}"
    rank = f", rank {dump['rank']}" if number(dump.get("rank")) > 0 else ""
    return f"Epoch {dump.get('epoch')}, batch {dump.get('batch_idx')}{rank}"


def _index(analyses) -> str:
    """Links to the dumps, grouped by cause."""
    if len(analyses) < 2:
        return ""
    groups = {}
    for i, a in enumerate(analyses, 1):
        item = f'<li><a href="#dump{i}">{escape(_name(a))}</a>: {escape(a.summary, 160)}</li>'
        groups.setdefault(str(a.verdict.get("cause")), []).append(item)
    parts = []
    for cause in sorted(groups, key=lambda c: -len(groups[c])):
        what = CAUSES.get(cause, "")
        count = plural(len(groups[cause]), "dump")
        head = f'<h3><span class="tag">{escape(cause)}</span> <small>{what}; {count}</small></h3>'
        parts.append(f"<div>{head}<ul>{''.join(groups[cause])}</ul></div>")
    title = f"<h2>{plural(len(analyses), 'dump')} by cause</h2>"
    return f'<nav aria-label="Dumps by cause">{title}<div class="causes">{"".join(parts)}</div></nav>'


def _article(a, index: int) -> str:
    sections = (
        _verdict(a),
        _fixes(a.verdict),
        rows_at_fault(a.dump, a.verdict),
        activations(a.activations),
        gradients(a.dump),
        history(a.dump),
        data_of_batch(a.dump),
        _origin(a.dump),
    )
    head = f"<h2>{escape(_name(a))}</h2>{_facts(a)}"
    return f'<article id="dump{index}">{head}{"".join(sections)}</article>\n'


def _facts(a) -> str:
    dump, shown = a.dump, []
    if not dump:
        return terms([("Run", escape(_run(a))), ("List", escape(a.path.name))], "facts")
    for term, key in (("Step", "step"), ("Loss", "loss"), ("Gradient norm", "grad_norm"), ("Learning rate", "lr")):
        shown.append((term, number_text(dump[key]) if key in dump else ""))
    shown.append(("Precision", escape(dump.get("amp_dtype", ""))))
    shown.append(("Loss scale", number_text(dump["scaler_scale"]) if "scaler_scale" in dump else ""))
    shown += [("Device", escape(dump.get("device", ""))), ("Run", escape(_run(a)))]
    shown.append(("Dump", f"{escape(a.path.name)}{'' if 'format_version' in dump else ' (old format, six keys)'}"))
    return terms(shown, "facts")


def _verdict(a) -> str:
    """The cause, the sentence, the place and the fix: what most readers need and no more."""
    cause = str(a.verdict.get("cause"))
    detail = a.verdict.get("detail")
    tag = f'<span class="tag bad">{escape(cause)}</span> '
    tag += f'<span class="tag">{escape(detail)}</span> ' if detail else ""
    meaning = "a row of the batch" if cause == "input" and "build" in a.dump else CAUSES.get(cause, "")
    tag += f'<span class="quiet">{meaning}</span>'
    lead = f'<p class="lead">{escape(a.summary)}</p>'
    evidence = "".join(f"<li>{escape(line)}</li>" for line in as_list(a.verdict.get("evidence"))[:50])
    evidence = f"<ul>{evidence}</ul>" if evidence else '<p class="quiet">None.</p>'
    place = f"<div><h3>Where</h3>{_place(a)}</div>"
    fix = f"<div>{_fix(a)}</div>"
    return f'<section>{tag}{lead}<div class="two">{place}{fix}</div></section>' + section("Evidence", evidence)


def _place(a) -> str:
    location, config = as_dict(a.verdict.get("location")), as_dict(a.dump.get("config"))
    code = {k: f"<code>{escape(location[k])}</code>" for k in location if location[k] not in (None, "", [])}
    names = (
        ("Module", "module"),
        ("Operation", "op"),
        ("Source", "source"),
        (parameter_title(location, config), "parameter"),
    )
    shown = [(term, code.get(key, "")) for term, key in names]
    rows = as_list(location.get("rows"))
    files = [as_dict(f) for f in as_list(location.get("files"))]
    lines = [f"<code>{escape(f.get('path'))}</code>" + _sample(f.get("sample")) for f in files[:8]]
    lines += [f"and {len(files) - 8} more"] if len(files) > 8 else []
    shown.append(("File" if len(files) == 1 else "Files", "<br>".join(lines)))
    shown.append(("Rows", escape(", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else ""))))
    shown += [(key.title(), escape(location[key])) for key in ("phase", "rank") if location.get(key) is not None]
    replay = as_dict(a.verdict.get("replay"))
    if replay.get("reproduced"):
        words = REPLAYED.get(str(replay["reproduced"]), replay["reproduced"])
        shown.append(("Replay", escape(f"{words} ({number_text(replay.get('seconds'))} s)")))
    empty = '<p class="quiet">The analysis names no place.</p>'
    return terms(shown, "place") if any(d for _, d in shown) else empty


def _sample(sample) -> str:
    return "" if sample is None else f", sample {escape(sample)}"


def _fix(a) -> str:
    """The first verified fix, as the line to write or to edit."""
    fixes = [as_dict(r) for r in as_list(a.verdict.get("recommendations"))]
    found = next((r for r in fixes if r.get("verdict") == "verified"), None)
    title, note = "Fix", ""
    if found is None:
        found = next((r for r in fixes if r.get("verdict") != "refuted"), None)
        title, note = "Fix to try", '<p class="quiet">Not verified by a replay.</p>'
    if found is None:
        words = "No fix that was tried removes the fault." if fixes else "None was tried."
        return f'<h3>Fix</h3><p class="quiet">{words}</p>'
    if note and a.verdict.get("cause") == "unknown" and found.get("action") == "set":  # nothing speaks for it
        return f'<h3>Fix</h3><p class="quiet">None was tried: {escape(found.get("outcome"))}</p>'
    where, code = _change(a, found)
    is_diff = bool(as_dict(found.get("change")).get("diff"))
    shown = (
        f'<pre class="diff"><code>{_diff(code)}</code></pre>'
        if is_diff
        else f"<pre><code>{escape(code, 2000)}</code></pre>"
    )
    block = (
        f'<p class="quiet">{escape(where)}</p><div class="block">{shown}'
        '<button type="button" hidden>Copy</button></div>'
    )
    return f'<div class="fix"><h3>{title}</h3><p>{escape(found.get("text"))}</p>{note}{block if code else ""}</div>'


def _diff(text: str) -> str:
    """A unified diff with its lines that go and come marked; read as text it is the diff."""
    marks = {"-": "out", "+": "in"}
    lines = []
    for line in text.splitlines()[:200]:
        mark = "" if line[:3] in ("---", "+++") else marks.get(line[:1], "")
        lines.append(f'<span class="{mark}">{escape(line, 500)}</span>' if mark else escape(line, 500))
    return "\n".join(lines)


def _change(a, fix: dict) -> tuple[str, str]:
    """Where to make a change and the text of it."""
    config, location = as_dict(a.dump.get("config")), as_dict(a.verdict.get("location"))
    action, change = fix.get("action"), fix.get("change")
    if action == "exclude_file":
        guilty = [str(f["path"]) for f in map(as_dict, as_list(location.get("files"))) if f.get("path")]
        rows = [as_dict(f) for f in as_list(a.dump.get("files"))]
        lines = {str(f.get("path")): f.get("line") for f in rows if f"{ENDING}/" not in str(f.get("path"))}
        listed = [f"{config.get('train_list') or 'train list'}:{lines[p]}\n{p}" for p in guilty if lines.get(p)]
        others = [p for p in guilty if not lines.get(p)]
        return ("Remove from the train list:" if listed else "Remove this file:"), "\n".join((listed + others)[:10])
    if action == "fix_code":
        diff = as_dict(change).get("diff")
        return (
            ("Apply with git apply, or patch -p1:", str(diff)) if diff else ("Edit:", str(location.get("source") or ""))
        )
    written = [f"{key}: {_yaml(value)}" for key, value in as_dict(change).items()]
    for i, key in enumerate(as_dict(change)):
        written[i] += f"  # was {_yaml(config[key])}" if key in config else ""
    return f"In the configuration {config.get('config') or ''}".rstrip() + ":", "\n".join(written)


def _yaml(value) -> str:
    """A value on one line of YAML, read back as it was."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)
    except (yaml.YAMLError, ValueError, RecursionError):
        text = plain(value)
    return re.sub(r"\n\.\.\.$", "", text.strip()).replace("\n", " ")


def _fixes(verdict) -> str:
    rows = []
    for fix in [as_dict(r) for r in as_list(verdict.get("recommendations"))][:100]:
        mark = escape(fix.get("verdict") or "untested")
        outcome = escape(fix.get("outcome") or "")
        text = f'<th scope="row">{escape(fix.get("text"))}</th>'
        rows.append(f'<tr>{text}<td><span class="tag {mark}">{mark}</span></td><td>{outcome}</td></tr>')
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("Fix", "Verdict", "Outcome"))
    caption = "<caption>Each alone, in a replay of this batch. Verified: the fault is gone.</caption>"
    table = f'<table class="fixes">{caption}<thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return section("Fixes", table if rows else "")


def _origin(dump) -> str:
    """Versions, and the configuration folded away."""
    versions = terms([(escape(k), escape(v)) for k, v in list(as_dict(dump.get("versions")).items())[:40]], "facts")
    body = versions if dump.get("versions") else ""
    config = "\n".join(f"{plain(k)}: {plain(v)}" for k, v in as_dict(dump.get("config")).items())
    if config:
        body += f"<details><summary>Configuration</summary><pre>{escape(config, 20000)}</pre></details>"
    return section("Versions and configuration", body)
