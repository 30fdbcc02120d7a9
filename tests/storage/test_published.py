"""The table of published checkpoints, and what is taken out of the files that are offered."""

import io
import tarfile
import zipfile

import pytest
import torch
import yaml
from programs import ROOT

from benchmarks.published_models import SETTINGS
from errors import UsageError
from fetch_model import write_pair
from settings import plugins
from settings.reader import load_config
from storage.published import END, is_archive, is_web_page, markdown, read_table, sums_of, take

ROWS = read_table()
PAIRS = list({(row.config, str(row.keys)): row for row in ROWS.values()}.values())


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: row.name)
def test_the_configuration_of_every_row_builds_its_model(row, tmp_path):
    write_pair(row, tmp_path / "config.yaml")
    config, _, notes, _ = load_config(["--config", str(tmp_path / "config.yaml")])
    assert not notes and config.freeze_epochs == 2 and not config.train_list.startswith("data/mine")
    keys = {**yaml.safe_load(row.base.read_text()), **row.keys}
    assert all(getattr(config, name) == value for name, value in keys.items())
    values = {name: value for name, value in config.values().items() if name != "frontend"}
    with torch.device("meta"):
        model = plugins.call(plugins.load("models", config.model), values)
    counted = {setting.parameters for setting in SETTINGS} | {29_016_704}  # ERes2Net large with 512 values
    assert sum(parameter.numel() for parameter in model.parameters()) in counted


def test_every_row_says_where_what_it_says_stands():
    for row in ROWS.values():
        assert row.url.startswith(("https://", "http://www.robots.ox.ac.uk/")) and row.page.startswith("https://")
        assert row.licence and row.licence_from and row.data and row.project
        assert row.eer == "-" or len(row.eer.split(" / ")) == 3
    figures = {setting.eer for setting in SETTINGS} | {"0.90 / - / -"}
    plain = [row for row in ROWS.values() if row.eer != "-" and "LM" not in row.how]
    assert plain and all(row.eer in figures for row in plain), [row.name for row in plain if row.eer not in figures]
    assert {row.base.name for row in ROWS.values()} <= {path.name for path in ROOT.glob("configs/interop/*.yaml")}


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "models.md").read_text()
    assert markdown(ROWS) + END in page, "python -m storage.published docs/models.md"


@pytest.mark.parametrize("text", ["", "{}", "- a", "3"])
def test_a_table_without_rows_is_refused(text, tmp_path):
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"table\.yaml: expected rows by name"):
        read_table(tmp_path / "table.yaml")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sum": "x"}, "unknown key 'sum'"),
        ({"url": 3}, "url: expected a text"),
        ({"licence": ""}, "licence is missing"),
        ({"sha256": "AB"}, "sha256: expected 64 small hexadecimal digits"),
        ({"file": "../x.pt"}, "file: expected the name of a file"),
        ({"file": r"a\x.pt"}, "file: expected the name of a file"),
        ({"file": ".ssh"}, "file: expected the name of a file"),
        ({"config": "none"}, "no such file: configs/interop/none.yaml"),
        ({"keys": "depth: 3"}, "keys: expected keys and values"),
    ],
)
def test_a_table_that_cannot_be_is_refused_by_row_and_key(change, said, tmp_path):
    row = {"project": "p", "url": "https://x/y", "file": "y", "config": "wespeaker_resnet34", "page": "z"}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"mine": {**row, "licence": "MIT", **change}}))
    with pytest.raises(UsageError, match=r"table\.yaml: mine: ") as caught:
        read_table(tmp_path / "table.yaml")
    assert said in str(caught.value)


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path, members, kind=tarfile.REGTYPE, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, "/etc/passwd"
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_one_file_is_taken_out_of_an_archive_and_its_paths_are_not_used(tmp_path):
    members = {"a/avg_model.pt": b"weights", "a/config.yaml": b"x: 1", "../../evil.pt": b"no"}
    for path in (
        zipped(tmp_path / "a.zip", members),
        tarred(tmp_path / "a.tar.gz", members),
        tarred(tmp_path / "a.tar", members, mode="w"),
    ):
        assert is_archive(path)
        take(path, "avg_model.pt", tmp_path / "out.pt", 100)
        assert (tmp_path / "out.pt").read_bytes() == b"weights"
        take(path, "evil.pt", tmp_path / "out.pt", 100)  # wherever it says it lies, it is written where it was asked
        assert (tmp_path / "out.pt").read_bytes() == b"no" and not (tmp_path.parent / "evil.pt").exists()
        with pytest.raises(UsageError, match=r"holds no file 'model\.pt', but avg_model\.pt, config"):
            take(path, "model.pt", tmp_path / "out.pt", 100)
        with pytest.raises(UsageError, match="larger than the"):
            take(path, "avg_model.pt", tmp_path / "more.pt", 3)
        assert not (tmp_path / "more.pt").exists()
    twice = zipped(tmp_path / "b.zip", {"a/m.pt": b"1", "b/m.pt": b"2"})
    with pytest.raises(UsageError, match=r"holds 2 files 'm\.pt'"):
        take(twice, "m.pt", tmp_path / "out.pt", 100)
    with pytest.raises(UsageError, match=r"holds no file 'm\.pt', but no files"):
        take(tarred(tmp_path / "link.tar.gz", {"m.pt": b""}, tarfile.SYMTYPE), "m.pt", tmp_path / "out.pt", 100)


def test_a_damaged_archive_is_one_line(tmp_path):
    path = zipped(tmp_path / "a.zip", {"m.pt": bytes(1000)})
    data = bytearray(path.read_bytes())
    data[100:110] = b"xxxxxxxxxx"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"a\.zip: damaged: Bad CRC"):
        take(path, "m.pt", tmp_path / "out.pt", 10_000)
    cut = tarred(tmp_path / "a.tar.gz", {"m.pt": torch.rand(20_000).numpy().tobytes()})
    cut.write_bytes(cut.read_bytes()[:30_000])
    with pytest.raises(UsageError, match=r"a\.tar\.gz: damaged: "):
        take(cut, "m.pt", tmp_path / "out.pt", 10**6)
    assert not (tmp_path / "out.pt").exists()


def test_a_checkpoint_is_no_archive_and_a_web_page_is_no_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    for new in (True, False):
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=new)
        assert not is_archive(path) and not is_web_page(path)
        take(path, "other name", tmp_path / "b.pt", 10**6)
        assert (tmp_path / "b.pt").read_bytes() == path.read_bytes()
    path.write_text("\n<!DOCTYPE html><title>Log in</title>")
    assert is_web_page(path) and not is_archive(path)
    path.write_text("hello\n")
    assert sums_of(path)[0] == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert sums_of(path)[1] == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
