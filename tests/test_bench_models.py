"""The table of models: nothing on disk is missing from it, its counts and costs are right, its checks can fail."""

import subprocess
import sys

import pytest
import torch
from programs import ROOT

from benchmarks import bench_models
from benchmarks.published_models import SETTINGS, SOURCES
from errors import UsageError
from settings import plugins

BY_NAME = {setting.name: setting for setting in SETTINGS}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_parameter_counts(setting):
    assert bench_models.count_parameters(bench_models.build(setting)) == setting.parameters


def test_every_model_on_disk_has_a_setting_and_every_setting_a_row_in_the_page():
    listed = {setting.model for setting in SETTINGS}
    for name in plugins.available("models"):
        assert name in listed, f"models/{name}.py: has no setting in benchmarks/published_models.py"
    assert len(BY_NAME) == len(SETTINGS)
    assert {setting.source for setting in SETTINGS} - {""} <= set(SOURCES)
    page = (ROOT / "docs" / "models.md").read_text()
    for setting in SETTINGS:
        row = f"| {setting.name} | {bench_models.keys_text(setting)} | {setting.parameters:,} |"
        assert row in page, f"{row}: run python benchmarks/bench_models.py --write docs/models.md"
        assert f"`{setting.model}`" in page


# Published figures count the products of the attention's context in each of 200 frames; here they are computed once.
CONTEXT = 2 * 1536 * 128 * 199


@pytest.mark.parametrize("name, multiply_adds", [("ECAPA-TDNN 512", 1.04e9 - CONTEXT), ("ResNet34", 4.55e9)])
def test_flops_are_twice_the_published_multiply_adds(name, multiply_adds):  # ReDimNet paper's and wespeaker's tables
    flops = bench_models.count_flops(bench_models.build(BY_NAME[name]).eval())
    assert flops == pytest.approx(2 * multiply_adds, rel=0.02)


def test_attention_is_counted():
    class Attention(torch.nn.Module):
        def forward(self, x):
            x = x[:, :12800].reshape(1, 1, 100, 128)
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert bench_models.count_flops(Attention()) == 2 * 2 * 100 * 100 * 128


class Broken(torch.nn.Module):
    """A model that the checks must refuse: ``unused`` gets no gradient, or the embedding overflows fp16."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.linear, self.unused, self.factor = torch.nn.Linear(100, 4), torch.nn.Parameter(torch.zeros(3)), factor

    def forward(self, x):
        return self.factor * self.linear(x[:, :100]) + 0 * self.unused.sum()


def test_the_checks_name_what_fails(monkeypatch):
    monkeypatch.setattr(bench_models, "build", lambda setting: Broken())
    with pytest.raises(UsageError, match="VGGVox: no gradient reaches unused"):
        bench_models.check_row(BY_NAME["VGGVox"])
    monkeypatch.setattr(bench_models, "build", lambda setting: Broken(1e7))
    with pytest.raises(UsageError, match=r"VGGVox: not finite in torch\.float16"):
        bench_models.check_row(BY_NAME["VGGVox"])
    monkeypatch.setattr(bench_models, "build", lambda setting: Broken())
    with pytest.raises(UsageError, match=r"VGGVox: 407 parameters, expected 4,295,104"):
        bench_models.counted(BY_NAME["VGGVox"], Broken())


def test_tables_go_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    marks = "<!-- {0}: made by benchmarks/bench_models.py -->\n{1}<!-- end of {0} -->\n"
    page.write_text("before\n" + marks.format("models", "old\n") + "between\n" + marks.format("checks", "kept\n"))
    bench_models.replace(page, "models", "| new |")
    assert page.read_text() == (
        "before\n" + marks.format("models", "| new |\n") + "between\n" + marks.format("checks", "kept\n")
    )
    with pytest.raises(UsageError, match=r"page\.md: has no line '<!-- further settings"):
        bench_models.replace(page, "further settings", "")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--only", "NoSuchNet"], "--only: no setting holds NoSuchNet in its name\n"),
        (["--write", "nowhere.md"], "--write: no such file: 'nowhere.md'\n"),
        (["--wrote", "x"], "benchmarks/bench_models.py: unrecognized arguments: --wrote x\n"),
    ],
)
def test_usage_errors_are_one_line(words, said):
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_models.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (2, said)
