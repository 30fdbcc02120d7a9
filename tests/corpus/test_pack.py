"""Packs: the same batches as from files, bit for bit, however often packing was killed."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from programs import ROOT

import pack_data
from corpus.audio import AudioError, read_crop
from corpus.crop import Crop
from corpus.loader import make_loader
from corpus.pack import Pack
from corpus.sources import TrainSource
from corpus.train_list import read_train_lists
from DatasetLoader import SpeakerBatchSampler, TrainDataset, collate
from errors import UsageError
from settings.reader import load_config
from storage import packing


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory):
    """A folder of recordings of several kinds, one of them damaged; and its list."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(data / "wav", folder / "wav")
    lines = (data / "train_list.txt").read_text().splitlines()
    rng = np.random.default_rng(0)
    kinds = [("FLOAT", 16000, 1), ("PCM_24", 16000, 1), ("PCM_16", 8000, 1), ("PCM_16", 16000, 2), ("PCM_16", 44100, 2)]
    for line, (subtype, rate, channels) in zip(lines[::4], kinds):
        path = folder / "wav" / line.split()[1]
        path.unlink()
        soundfile.write(path.with_suffix(".wav"), rng.normal(0, 0.1, (rate, channels)), rate, subtype=subtype)
    lines[::4] = [line.replace(".flac", ".wav") for line in lines[::4][: len(kinds)]] + lines[::4][len(kinds) :]
    victim = folder / "wav" / lines[1].split()[1]
    victim.write_bytes(victim.read_bytes()[:40])
    (folder / "list.txt").write_text("\n".join(lines))
    return folder


def pack(mixed, out, *more):
    words = ["--train_list", str(mixed / "list.txt"), "--train_path", str(mixed / "wav"), "--out", str(out)]
    return pack_data.main([*words, *more])


def batches(settings, mixed, workers=0, rank=0, world=1, first=0, **more):
    keys = {**settings, "train_list": mixed / "list.txt", "train_path": mixed / "wav", "speed_perturb": True, **more}
    config = load_config([f"--{key}={value}" for key, value in keys.items()])[0]
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, False, rank, world)
    sampler.set_position(2, first)
    return list(make_loader(dataset, sampler, collate, config, workers))


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert torch.equal(a["data"], b["data"]) and torch.equal(a["label"], b["label"]) and a["events"] == b["events"]
        for info, packed in zip(a["files"], b["files"]):
            assert info == {key: value for key, value in packed.items() if not key.startswith("pack")}


def test_batches_from_a_pack_are_those_from_files(settings, mixed, tmp_path, capsys):
    assert pack(mixed, tmp_path / "pack", "--shard_mb", "1") == 0
    said = capsys.readouterr()
    assert (
        said.err.startswith("unreadable: ") and "list.txt:2): " in said.err and f"--train_pack {tmp_path}" in said.out
    )
    files = batches(settings, mixed)
    for workers in (0, 2):
        same(files, batches(settings, mixed, workers, train_pack=tmp_path / "pack"))
    assert {kind for batch in files for kind, *_ in batch["events"]} >= {"unreadable", "resampled", "mixed down"}
    for channel in ("1", "loudest"):
        keys = {"channel": channel, "train_pack": tmp_path / "pack"}
        same(batches(settings, mixed, channel=channel), batches(settings, mixed, **keys))
    other = mixed / "other.txt"  # a part of the list in another order
    other.write_text("\n".join(reversed((mixed / "list.txt").read_text().splitlines()[3:])))
    keys = {"train_list": other, "train_pack": tmp_path / "pack"}
    same(batches(settings, mixed, train_list=other), batches(settings, mixed, **keys))


def test_processes_and_a_later_start_share_the_same_batches(settings, mixed, tmp_path):
    pack(mixed, tmp_path / "pack")
    files = batches(settings, mixed, batch_size=8)
    keys = {"batch_size": 4, "world": 2, "train_pack": tmp_path / "pack"}
    ranks = [batches(settings, mixed, workers, rank, **keys) for workers, rank in ((0, 0), (1, 1))]
    for whole, *parts in zip(files, *ranks):
        for rank, part in enumerate(parts):
            assert torch.equal(whole["data"][:, rank::2], part["data"])
    same(files[2:], batches(settings, mixed, first=2, batch_size=8, train_pack=tmp_path / "pack"))


def test_a_crop_is_made_again_from_the_pack_if_the_file_is_gone(settings, mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "copy")
    pack(tmp_path / "copy", tmp_path / "pack")
    found = batches(settings, tmp_path / "copy", train_pack=tmp_path / "pack")[0]
    shutil.rmtree(tmp_path / "copy" / "wav")
    for row, info in enumerate(found["files"]):
        clean, _ = Crop.from_dict(info).load(found["data"].shape[-1])
        assert np.array_equal(clean, found["data"][0, row].numpy())


def test_a_killed_packing_goes_on_and_gives_the_same_pack(mixed, tmp_path, monkeypatch):
    inner, calls = packing.pack_file, []

    def dying(key, path):
        calls.append(path)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return inner(key, path)

    monkeypatch.setattr(packing, "pack_file", dying)
    with pytest.raises(KeyboardInterrupt):
        packing.write_pack(listed(mixed), tmp_path / "killed", 1 << 16, 1)
    assert not (tmp_path / "killed" / "pack.json").exists() and (tmp_path / "killed" / "shard-00000.npy").exists()
    with pytest.raises(UsageError, match=r"pack.json: no such file; python pack_data.py --out .* finishes it"):
        Pack(tmp_path / "killed")
    monkeypatch.undo()
    done = packing.write_pack(listed(mixed), tmp_path / "killed", 1 << 16, 2)
    assert 0 < done["new"] < done["files"] == 30
    packing.write_pack(listed(mixed), tmp_path / "uncut", 1 << 16, 2)
    for path in (tmp_path / "uncut").iterdir():
        assert path.name == ".lock" or path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name
    assert pack(mixed, tmp_path / "killed") == 0


def listed(mixed):
    return read_train_lists((TrainSource(str(mixed / "list.txt"), str(mixed / "wav")),))


def test_changed_files_and_new_lines_are_added(mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "copy")
    copy, out = tmp_path / "copy", tmp_path / "pack"
    lines = (copy / "list.txt").read_text().splitlines()
    (copy / "list.txt").write_text("\n".join(lines[:20]))
    pack(copy, out)
    changed = copy / "wav" / lines[5].split()[1]
    soundfile.write(changed, np.full(9000, 0.25), 16000)
    (copy / "list.txt").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"list.txt: 10 files of the list are not in .*, the first '.*'; python"):
        Pack(out).rows_of(listed(copy).paths, listed(copy).hash, str(copy / "list.txt"))
    assert packing.write_pack(listed(copy), out, 1 << 20, 1)["new"] == 11
    assert read_crop("", opened=Pack(out).recording(5, "")).x.tolist() == [0.25] * 9000


@pytest.mark.parametrize("odd", [1.0, -0.0, np.nan, np.inf, 3e-8, 1e6])
def test_samples_that_are_none_of_16_bits_keep_their_bits(tmp_path, odd):
    x = np.array([-1.0, 0.5, 0.0, 32767 / 32768] * 300, np.float32)
    for values, kind in ((x, 1), (np.append(x, np.float32(odd)), 2)):
        soundfile.write(tmp_path / "s.wav", values, 16000, subtype="FLOAT")
        (tmp_path / "list").write_text("s s.wav\n")
        packing.write_pack(
            read_train_lists((TrainSource(str(tmp_path / "list"), str(tmp_path)),)), tmp_path, 1 << 20, 1
        )
        pack = Pack(tmp_path)
        assert pack.index["kind"][0] == kind
        assert pack.recording(0, "").read(0, len(values)).tobytes() == values.tobytes()


def test_a_damaged_pack_is_found(mixed, tmp_path, capsys):
    out = tmp_path / "pack"
    pack(mixed, out)
    assert pack_data.main(["--out", str(out), "--check"]) == 0
    shard = out / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert pack_data.main(["--out", str(out), "--check"]) == 1
    assert capsys.readouterr().err.startswith("damaged: train000/")
    index = np.load(out / "index.npy")
    for field, value in (("offset", 1 << 40), ("frames", 1 << 60), ("shard", 7), ("kind", 9), ("channels", 0)):
        spoilt = index.copy()
        spoilt[field][0] = value
        np.save(out / "index.npy", spoilt)
        with pytest.raises(AudioError, match=r"row 0 of .*index.npy is damaged"):
            read_crop("", opened=Pack(out).recording(0, ""))
    np.save(out / "index.npy", index)
    shard.write_bytes(content[:-64])
    with pytest.raises(UsageError, match=r"shard-00000.bin: has \d+ bytes instead of \d+"):
        Pack(out)
    (out / "pack.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UsageError, match="format 2, this program reads 1"):
        Pack(out)


def test_a_mistake_of_the_command_is_one_line(tmp_path):
    for words, text in [([], "needs --train_list"), (["--train_list", "x", "--train_path", "."], "no such file: 'x'")]:
        command = [sys.executable, str(ROOT / "pack_data.py"), "--out", str(tmp_path / "p"), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
