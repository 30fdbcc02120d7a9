"""The HTML page of NaN dumps: whole, closed to the outside, and drawn whatever the dump holds."""

import copy
import math
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from postmortem.charts import bad_runs, log_mel, number_text
from postmortem.page import render
from postmortem.panels import Origin
from storage.dump_statistics import data_lines
from web.charts import Scale

NAN, INF = math.nan, math.inf
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\u202e\x00\udcff"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass
class Analysis:
    """Stand-in for postmortem.analysis.Analysis."""

    path: Path
    dump: dict
    verdict: dict
    summary: str = "Something is not finite."
    activations: list = field(default_factory=list)


class Outline(HTMLParser):
    """Checks that elements close in order; collects tags with attributes and the text of the page."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("script", "style") else ""

    def every(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def tone(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.sin(torch.arange(shape[-1]) * 0.2).expand(shape) * 0.3 + 0.01 * torch.randn(shape, generator=generator)


def full_dump(data, **more):
    draw = {"kind": "noise", "path": "musan/noise/n.wav", "start": 5, "snr_db": 7.5, "gain": 0.2}
    info = {"start": 8000, "rate": 16000, "speed": 1.0, "peak": 0.3, "rms": 0.1, "augment": [draw]}
    files = [{**info, "path": f"wav/id{r}/a.flac", "line": r + 1} for r in range(data[..., 0].numel())]
    stats = {f"layer{i}.weight": {"numel": 9, "nan": int(i == 1), "inf": 0, "norm": 0.1 * i + 0.1} for i in range(30)}
    steps = [{"step": s, "loss": 2.0**s, "grad_norm": NAN if s == 5 else 1.0, "lr": 0.1, "scale": 1} for s in range(9)]
    return {
        **{"format_version": 1, "reason": "loss_nonfinite", "batch_idx": 3, "epoch": 2, "step": 9, "rank": 0},
        **{"loss": NAN, "prec1": 0.0, "grad_norm": INF, "data": data, "label": torch.arange(data.shape[-2])},
        **{"files": files, "lr": 0.1, "scaler_scale": 1.0, "amp_dtype": "float16", "device": "cuda:0"},
        **{"grad_stats": stats, "history": steps, "versions": {"torch": "2.11"}},
        **{"config": {"config": "a.yaml", "train_list": "l.txt", "lr": 0.1}, **more},
    }


def module(name, peak, nonfinite=0, first=False):
    return {"name": name, "kind": "Conv1d", "abs_max": peak, "nonfinite": nonfinite, "first": first}


def make(dump, recommendations=(), modules=(), **location):
    verdict = {"cause": "input", "detail": "nonfinite", "location": location, "evidence": ["Row 1 is NaN"]}
    verdict |= {"replay": {"reproduced": "bit_equal", "seconds": 1.5}, "recommendations": list(recommendations)}
    return Analysis(Path("exps/run/debug_nan/nan_batch_3_epoch_2.pt"), dump, verdict, activations=list(modules))


def fix(verdict, action="set", **change):
    return {"text": "Change it", "action": action, "change": change or None, "verdict": verdict, "outcome": "loss 1.5"}


@pytest.fixture(scope="module")
def example():
    """A dump whose row 1 is NaN at sample 4345 of the crop: sample 12345 of its file."""
    data = tone(1, 4, 16240)
    data[0, 1, 4345] = NAN
    modules = [module(f"m{i}", 10.0**i) for i in range(5)] + [module("m5", 65000.0, 7, True)]
    fixes = [fix("refuted", lr=0.05), fix("verified", lr=0.01), fix("untested", scale=20)]
    return make(full_dump(data), fixes, modules, rows=[1], files=[{"path": "wav/id1/a.flac", "sample": 12345}])


def test_page_tells_the_whole_story(example):
    page = render([example])
    outline = Outline(page)
    assert outline.text.count("Something is not finite.") == 1
    told = "input|wav/id1/a.flac|sample 12345|Epoch 2, batch 3|float16|cuda:0|Row 1 is NaN|SNR 7.5 dB|musan/noise/n.wav"
    told += "|fp16 limit 65504|7 NaN/Inf, the first|1 of 30 parameters|1 of 9 NaN|1 NaN, 0 Inf of 64960|Ten largest"
    assert not [words for words in told.split("|") if words not in outline.text]
    assert "<pre><code>lr: 0.01  # was 0.1</code></pre>" in page  # the verified one, not the first
    assert [outline.text.count(verdict) for verdict in ("refuted", "untested")] == [1, 1]
    assert 'class="cross"' in page and "Loss, last 9 steps, logarithmic" in page


def test_bad_sample_is_marked_where_it_is(example):
    page = render([example])
    assert "NaN at sample 4345" in page and "(file: sample 12345, 0.7716 s)" in page
    assert abs(float(re.search(r'<rect class="band" x="([\d.]+)%', page)[1]) - 100 * 4345 / 16240) < 0.2
    finite = copy.deepcopy(example)
    finite.dump["data"].nan_to_num_(0)  # an absurd, finite sample is marked from the verdict
    assert "file sample 12345" in render([finite]) and 'class="band"' not in render([finite])
    # The same in a file of another rate, read faster.
    origin = Origin.of({"start": 4410, "rate": 44100, "speed": 1.1})
    assert origin.start == pytest.approx(0.1)
    assert origin.file_sample(16000) == 4410 + round(44100 * 1.1)
    assert origin.crop_sample(origin.file_sample(5000)) == pytest.approx(5000, abs=1)
    assert Origin.of({}).start is None and Origin.of({"start": 1, "rate": 0, "speed": NAN}).rate == 16000


def test_list_line_and_code_line_to_edit(example):
    a = copy.deepcopy(example)
    a.verdict["location"]["source"] = "loss/x.py:31"
    for action, words in (("exclude_file", "l.txt:2\nwav/id1/a.flac"), ("fix_code", "loss/x.py:31")):
        a.verdict["recommendations"] = [fix("verified", action)]
        assert f"<pre><code>{words}</code></pre>" in render([a])


def test_index_groups_dumps_by_cause(example):
    other = copy.deepcopy(example)
    other.verdict["cause"] = "optimizer"
    outline = Outline(render([other, example, example]))
    nav = outline.text[: outline.text.index("Step")]
    assert nav.index("input") < nav.index("2 dumps") < nav.index("optimizer") < nav.index("1 dump")
    assert [a["href"] for a in outline.every("a")] == ["#dump2", "#dump3", "#dump1"]


def test_nothing_is_loaded_from_outside_and_all_is_named(example):
    page = render([example, example])
    plain = re.sub(r"data:image/png;base64,[\w+/=]+", "data:", page)
    assert not re.search(r"https?:|//[a-z]|@import|<link|<base|srcset", plain)
    assert all(found.startswith("data:") for found in re.findall(r"url\(([^)]*)", page))
    outline = Outline(page)
    loaded = [v for _, attrs in outline.tags for k, v in attrs.items() if k in ("href", "src", "xlink:href")]
    assert loaded and all(v.startswith(("#dump", "data:image/png;base64,")) for v in loaded)
    policy = next(m["content"] for m in outline.every("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert not [k for _, attrs in outline.tags for k in attrs if k == "style" or k.startswith("on")]
    assert len(outline.every("title")) == 1 + sum("aria-hidden" not in svg for svg in outline.every("svg"))
    assert all(th.get("scope") in ("row", "col") for th in outline.every("th"))


def test_hostile_strings_stay_text(example):
    def spoil(value):
        if isinstance(value, dict):
            return {spoil(k) if k.startswith("layer") else k: spoil(v) for k, v in value.items()}
        spoilt = list(map(spoil, value)) if isinstance(value, list) else value
        return HOSTILE + value if isinstance(value, str) else spoilt

    example = copy.deepcopy(example)
    example.verdict["recommendations"][1]["change"] = {"lr": "x"}
    bad = Analysis(Path("x/debug_nan") / HOSTILE.replace("/", ""), *map(spoil, (example.dump, example.verdict)))
    bad.summary, bad.activations = HOSTILE, spoil(example.activations)
    for page in (render([bad]), render([bad, bad])):
        outline = Outline(page)
        page.encode("utf-8")  # lone surrogates of an undecodable file name are written out
        assert len(outline.every("script")) == 1 and not outline.every("img")
        assert "onerror" in outline.text and not [a for _, attrs in outline.tags for a in attrs if "onerror" in a]
        assert "\u202e" not in page and "\x00" not in page


ODD_DATA = {
    **{"0-d": torch.tensor(NAN), "empty": torch.zeros(0), "1-d": tone(8000), "features": tone(64, 200, 64)},
    **{"no samples": torch.zeros(2, 4, 0), "one sample": torch.ones(2, 4, 1)},
    **{"all NaN": torch.full((4, 8000), NAN), "all Inf": torch.full((1, 4, 8000), -INF)},
    "gaps": torch.where(torch.arange(32000) % 2 == 0, NAN, 0.1).expand(2, 4, -1),
    **{"silence": torch.zeros(4, 8000), "absurd": torch.tensor([3e38, -3e38]).repeat(4, 4000)},
    **{"int": torch.arange(32000).view(4, 8000), "half": tone(4, 8000).half()},
    **{"complex": torch.full((4, 8000), 1j), "sparse": torch.eye(4).to_sparse()},
    **{"endless": torch.zeros(1).expand(1 << 40), "meta": torch.zeros(4, 8000, device="meta")},
}


@pytest.mark.parametrize("data", ODD_DATA.values(), ids=ODD_DATA)
def test_odd_data(data):
    old = {"batch_idx": 1, "epoch": 1, "data": data, "label": torch.tensor(3), "loss": NAN, "prec1": 0.0}
    for dump in (old, {**old, "format_version": 1}):
        page = render([make(dump, rows=[0, 99, -1, "x", None])])
        Outline(page)
        assert not re.search(r'(nan|inf)%|\b(x|y|d|cx|cy)="[^"]*(nan|inf)', page)


def test_percentiles_are_those_of_the_text_report():
    """Of few values, of which nearest ranks and interpolation tell apart."""
    dump = full_dump(torch.tensor([[[0.0, 0.1, 0.2, 0.7]]]))
    text = next(line for line in data_lines(dump) if line.startswith("Percentiles"))
    expected = [float(number) for number in re.findall(r"%: ([-.\d]+)", text)]
    page = Outline(render([make(dump)])).text
    shown = re.search(r"Percentiles\s*(1 %:.*?99 %:\s*[-.\d]+)", page)[1]
    assert [float(number) for number in re.findall(r"%:\s*([-.\d]+)", shown)] == expected


def test_a_setting_that_nothing_speaks_for_is_no_fix_to_try():
    found = make(full_dump(tone(1, 4, 8000)), [fix("untested", lr=0.05)])
    for cause, said in (("unknown", "None was tried: loss 1.5"), ("loss", "Not verified by a replay.")):
        text = Outline(render([replace(found, verdict={**found.verdict, "cause": cause})])).text
        assert said in text and ("Fix to try" in text) == (cause == "loss")


def test_missing_and_malformed_keys():
    assert "No dump was found" in render([])
    Outline(render([Analysis(Path("a.pt"), {}, {})]))
    odd = {key: [None, 3, {"x": []}, "t"] for key in full_dump(tone(1, 2, 8000))}
    odd |= {"data": tone(1, 2, 8000), "label": torch.zeros(0), "grad_stats": {"a": None, 3: {"norm": 10**400}}}
    odd["config"] = {"lr": 10**5000, "x": [tone(3)]}  # an int that Python refuses to write out
    Outline(render([make(odd), make({**odd, "files": [{"path": ["x"], "augment": [1, {}], "start": "s"}]})]))
    none = dict.fromkeys(("location", "evidence", "recommendations", "replay"))
    Outline(render([Analysis(Path("a.pt"), odd, none, "", [{}, None, {"abs_max": "x", "nonfinite": INF}])]))


def test_a_large_dump_stays_small():
    data, many, long = tone(2, 8, 64000), range(5000), "a/" * 5000
    data[..., ::7] = NAN
    stats = {f"{long}{i}": {"numel": 4, "nan": i % 2, "inf": 0, "norm": 10.0 ** (i % 9)} for i in many}
    steps = [{"step": s, "loss": NAN if s % 2 else s, "grad_norm": 1 / (s + 1), "lr": s, "scale": 1} for s in many]
    modules = [module(f"{long}{i}", float(i), i % 2, i == 2501) for i in many]
    dump = full_dump(data, grad_stats=stats, history=steps, config={f"{long}{i}": long for i in range(500)})
    page = render([make(dump, [fix("untested", x=long)] * 500, modules, rows=list(range(16)))])
    Outline(page)
    assert len(page) < 1.5e6 and "12 more are not drawn" in page and "5000 as numbers, the first 400" in page


def test_helpers():
    assert " ".join(map(number_text, (3, 65504, 0.03, 123456789, -INF, None))) == "3 65504 0.03 1.235e+08 -Inf NaN"
    assert bad_runs(torch.tensor([1, 1, 0, 0, 1, 0, 1]).bool()) == [(0, 1), (4, 4), (6, 6)]
    assert Scale.fit([1e-3, 1e3]).log and not Scale.fit([1, 2]).log and not Scale.fit([-1, 1e6]).log
    for values in ([], [0.0], [5e-324, 1e308], [-1e308, 1e308], [7.0, 7.0], [1e17, 1e17 + 16]):
        for log in (None, True):
            scale = Scale.fit(values, log)
            assert 0 < len(scale.ticks()) <= 7 and all(0 <= scale.at(v) <= 100 for v in [*values, -1.0, 0.0])
    mel = log_mel(torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000))
    centre = 2595 * math.log10(1 + 1000 / 700) / (2595 * math.log10(1 + 8000 / 700)) * 49 - 1
    assert abs(int(mel[:, 50].argmax()) - centre) <= 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_draws_the_page(example, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(render([example, example]), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom".split()
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path}/profile", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Something is not finite." in done.stdout and 'id="dump2"' in done.stdout
    assert '<button type="button">Copy' in done.stdout  # the script may run: it has taken "hidden" away
    assert "Content Security Policy" not in done.stderr


@pytest.mark.parametrize("words", [("--html", "none/x.html"), ("--patch", "none/x.diff"), ("--seconds", "-1")])
def test_what_cannot_be_written_is_said_before_the_analysis(words, tmp_path, capsys):
    (tmp_path / "nan_batch_1_epoch_1.pt").write_bytes(b"")
    from analyze_nan_debug import main

    assert main([str(tmp_path), words[0], str(tmp_path / words[1]) if words[1] != "-1" else "-1"]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and error.startswith(f"{words[0]}: ")
