"""Packs: the same batches as from files, bit for bit, however often packing was killed."""

import json
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from programs import ROOT
from trainers import loaded_batches

import pack_data
from corpus.audio import AudioError, read_crop
from corpus.crop import Crop
from corpus.loader import Batches, LoaderFailed, OpenFiles
from corpus.pack import Pack
from corpus.sources import TrainSource
from corpus.train_list import read_train_lists
from errors import UsageError
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


def batches(settings, mixed, *place, **more):
    return loaded_batches(settings, *place, **{"train_list": mixed / "list.txt", "train_path": mixed / "wav", **more})


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


def test_a_pack_of_flac_gives_the_same_batches_in_less_room(settings, mixed, tmp_path, capsys):
    for name in ("samples", "flac"):
        pack(mixed, tmp_path / name, "--format", name)
    files = batches(settings, mixed)
    for workers in (0, 2):
        same(files, batches(settings, mixed, workers, train_pack=tmp_path / "flac"))
    found = [Pack(tmp_path / name) for name in ("samples", "flac")]
    assert sum(map(len, found[1].shards)) < 0.9 * sum(map(len, found[0].shards))
    assert set(found[1].index["kind"].tolist()) == {0, 2, 3}  # of float and 24 bits as they are
    capsys.readouterr()
    pack(mixed, tmp_path / "flac", "--format", "flac")
    assert "0 of them new" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--format: .*flac holds flac; choose another folder for samples"):
        pack(mixed, tmp_path / "flac")
    with pytest.raises(UsageError, match=r"--format: .*samples holds samples; choose another folder for flac"):
        pack(mixed, tmp_path / "samples", "--format", "flac")
    row = int(np.flatnonzero(found[1].index["kind"] == 3)[2])
    shard = tmp_path / "flac" / "shard-00000.bin"
    content, place = bytearray(shard.read_bytes()), int(found[1].index["offset"][row])
    content[place + 8 : place + 40] = bytes(32)
    shard.write_bytes(content)
    with pytest.raises(AudioError):
        read_crop("", 100, opened=Pack(tmp_path / "flac").recording(row, ""))
    assert pack_data.main(["--out", str(tmp_path / "flac"), "--check"]) == 1


def test_samples_that_flac_cannot_hold_stay_samples():
    assert packing.encode(np.zeros((100, 9), np.int16), 16000) == b"" and packing.encode(
        np.ones((9, 2), np.int16), 8000
    )


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

    def dying(key, path, *more):
        calls.append(path)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return inner(key, path, *more)

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
        Pack(out).rows_of(listed(copy).paths, range(30), listed(copy).hash, str(copy / "list.txt"))
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
    index, header = np.load(out / "index.npy"), json.loads((out / "pack.json").read_text())
    np.save(out / "index.npy", index[::-1])
    with pytest.raises(UsageError, match="its index is damaged, or of another packing"):
        Pack(out)
    del header["index_hash"]  # as in packs of before
    (out / "pack.json").write_text(json.dumps(header))
    for field, value in (("offset", 1 << 40), ("frames", 1 << 60), ("shard", 7), ("kind", 9), ("channels", 0)):
        spoilt = index.copy()
        spoilt[field][0] = value
        np.save(out / "index.npy", spoilt)
        with pytest.raises(AudioError, match=r"row 0 of .*index.npy is damaged"):
            read_crop("", opened=Pack(out).recording(0, ""))
        capsys.readouterr()
        assert pack_data.main(["--out", str(out), "--check"]) == 1
        assert capsys.readouterr().err.startswith("damaged: train000/")
    index["rate"][0] = 0
    np.save(out / "index.npy", index)
    with pytest.raises(UsageError, match=r"index.npy has a sample rate of 0"):
        Pack(out)
    index["rate"][0] = 16000
    np.save(out / "index.npy", index)
    shard.write_bytes(content[:-64])
    with pytest.raises(UsageError, match=r"shard-00000.bin: has \d+ bytes instead of \d+"):
        Pack(out)
    (out / "pack.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(UsageError, match="format 3, this program reads 1 and 2"):
        Pack(out)


@pytest.mark.parametrize(
    "name, content",
    [
        *(("texts.json", "[]"), ("texts.json", '{"x": {}}'), ("texts.json", '{"1": 2}'), ("index.npy", "")),
        *(("offsets.npy", np.zeros(31)), ("offsets.npy", np.arange(31)), ("keys.npy", np.zeros(30, np.int32))),
        *(("pack.json", "[]"), ("pack.json", '{"format": 1, "shards": [{}], "list_sha256": "x"}')),
    ],
)
def test_a_pack_with_a_part_of_another_form_is_refused_in_one_line(packed, tmp_path, name, content):
    out = shutil.copytree(packed[1], tmp_path / "pack")
    header = json.loads((out / "pack.json").read_text())
    del header["index_hash"]
    (out / "pack.json").write_text(json.dumps(header))
    if isinstance(content, str):
        (out / name).write_text(content)
    else:
        np.save(out / name, content)
    with pytest.raises(UsageError, match=r"not a pack of pack_data.py: "):
        Pack(out)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of 30 short recordings, the first an mp3, with its list, and its pack of three shards."""
    folder = tmp_path_factory.mktemp("short")
    rng = np.random.default_rng(1)
    names = ["0.mp3", *(f"{number}.wav" for number in range(1, 30))]
    for name in names:
        soundfile.write(folder / name, rng.normal(0, 0.1, 20000), 16000)
    write_list(folder, names)
    assert make(folder, folder / "pack")["new"] == 30
    return folder, folder / "pack"


def write_list(folder, names):
    (folder / "list.txt").write_text("".join(f"s{name[0]} {name}\n" for name in names))


def make(folder, out):
    source = TrainSource(str(folder / "list.txt"), str(folder))
    return packing.write_pack(read_train_lists((source,)), out, 400_000, 1)


@pytest.fixture
def copied(packed, tmp_path):
    folder = shutil.copytree(packed[0], tmp_path / "copy")
    return folder, folder / "pack"


def test_killed_while_the_index_is_replaced_it_is_no_pack(copied, monkeypatch):
    folder, out = copied
    write_list(folder, ["0.mp3", *(f"{number}.wav" for number in range(29, 0, -1))])  # as long as before
    inner, done = packing.replacing, []

    def dying(path, *mode):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        return inner(path, *mode)

    monkeypatch.setattr(packing, "replacing", dying)
    with pytest.raises(KeyboardInterrupt):
        make(folder, out)
    with pytest.raises(UsageError, match=r"pack.json: no such file; python pack_data.py"):
        Pack(out)
    monkeypatch.undo()
    assert make(folder, out)["new"] == 0 and Pack(out).paths[1] == "29.wav"


def test_a_spawned_process_refuses_a_pack_that_was_written_anew(copied):
    folder, out = copied
    before = Pack(out)
    again = pickle.dumps(before)
    assert np.array_equal(pickle.loads(again).stored(3), before.stored(3))
    write_list(folder, ["0.mp3", *(f"{number}.wav" for number in range(29, 0, -1))])
    shutil.rmtree(out)
    make(folder, out)
    with pytest.raises(UsageError, match="was packed again since the run began"):
        pickle.loads(again).recording(1, "")
    reader = type("Reader", (), {"__getitem__": lambda self, row: pickle.loads(again).recording(row, "")})()
    failed = Batches(reader, list, OpenFiles(1)).__getitems__([1])
    assert isinstance(failed, LoaderFailed) and str(failed).startswith(f"{out}: was packed again")
    assert before.paths[1] == "1.wav" and np.array_equal(before.stored(1), Pack(out).stored(29))
    (out / "pack.json").unlink()
    with pytest.raises(UsageError, match="no such file"):
        pickle.loads(again).recording(1, "")


def test_a_crop_of_a_pack_is_made_again_from_it_while_it_has_the_recording(copied):
    folder, out = copied
    crops = []
    for row, name in enumerate(("0.mp3", "1.wav")):
        opened = Pack(out).recording(row, str(folder / name))
        read = read_crop(str(folder / name), 8000, 0.5, opened=opened)
        crop = Crop(str(folder / name), start=read.start, pack=str(out), pack_row=row, pack_crc=opened.crc)
        crops.append((read.x, Crop.from_dict(crop.to_dict())))
    wav = (folder / "1.wav").read_bytes()
    soundfile.write(folder / "1.wav", np.zeros(20000), 16000)  # after it was packed
    for x, crop in crops:
        assert np.array_equal(crop.load(8000)[0], x)
    make(folder, out)
    assert not crops[1][1].load(8000)[0].any() and np.array_equal(crops[0][1].load(8000)[0], crops[0][0])
    (folder / "1.wav").write_bytes(wav)
    shutil.rmtree(out)
    assert np.array_equal(crops[1][1].load(8000)[0], crops[1][0])


def spoil(path, how):
    if how is None:
        path.unlink()
    else:
        path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize(
    "ending, how",
    [
        (".bin", lambda b: b[:-100]),
        (".bin", None),
        (".json", lambda b: b"[]"),
        (".json", None),
        (".npy", lambda b: b[:50]),
    ],
)
def test_a_damaged_shard_is_packed_anew(copied, packed, capsys, ending, how):
    folder, out = copied
    spoil(out / f"shard-00001{ending}", how)
    assert 5 < make(folder, out)["new"] < 15
    said = capsys.readouterr().err
    assert "shard-00001: " in said and said.count("packed anew") == 1 and "Errno" not in said
    pack, whole = Pack(out), Pack(packed[1])
    assert all(np.array_equal(pack.stored(row), whole.stored(row)) for row in range(30))
    assert not list(packing.damaged(pack)) and make(folder, out)["new"] == 0


def test_a_file_that_could_not_be_read_is_tried_again_and_its_notes_go(copied, monkeypatch):
    folder, out = copied
    shutil.rmtree(out)
    inner = packing.Recording

    def unanswered(path):
        if path.endswith("/5.wav"):
            raise AudioError("Input/output error")
        return inner(path)

    monkeypatch.setattr(packing, "Recording", unanswered)
    for new in (30, 0):
        done = make(folder, out)
        assert (done["new"], [reason for *_, reason in done["bad"]]) == (new, ["Input/output error"])
    monkeypatch.undo()
    done = make(folder, out)
    assert (done["new"], done["bad"], Pack(out).texts) == (1, [], {})


def test_a_pack_that_was_made_below_another_root_is_said(packed, tmp_path):
    folder, out = packed
    for root, said in ((folder, False), (f"{folder}/../{folder.name}", False), (tmp_path, True)):
        found = read_train_lists((TrainSource(str(folder / "list.txt"), str(root), pack=str(out)),))
        found.open_packs()
        text = found.read_from(0)
        assert text.startswith(f"{folder}/list.txt is read from {out}")
        assert (f"packed below '{folder}', not below '{tmp_path}'" in text) == said


def test_few_decoded_files_wait_for_the_disk(monkeypatch, packed):
    begun, pool = [], ThreadPoolExecutor(2)
    monkeypatch.setattr(packing, "pack_file", lambda number: begun.append(number) or number)
    with pool, packing.tqdm(disable=True) as bar:
        files = packing.ahead(pool, ((number,) for number in range(100)), 4, bar)
        for number in files:
            time.sleep(0.001)
            assert len(begun) <= number + 5
    assert number == 99


def test_a_mistake_of_the_command_is_one_line(tmp_path):
    for words, text in [
        ([], "needs --train_list"),
        (["--train_list", "x", "--train_path", "."], "no such file: 'x'"),
        (["--shard_mb", "0"], "--shard_mb: must be at least 1, got 0"),
    ]:
        command = [sys.executable, str(ROOT / "pack_data.py"), "--out", str(tmp_path / "p"), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1


def test_what_the_system_refuses_is_one_line(packed, tmp_path):
    folder = packed[0]
    words = ["--train_list", str(folder / "list.txt"), "--train_path", str(folder)]
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(UsageError, match=r"^--out: .*file"):
            pack_data.main([*words, "--out", str(tmp_path / out)])
    with pytest.raises(UsageError, match=r"^train_path: none of the files of '.*list.txt' is below '.*', the first"):
        pack_data.main([*words[:3], str(tmp_path), "--out", str(tmp_path / "p")])
    (tmp_path / "x.yaml").write_text(f"train_list: {folder / 'list.txt'}\ntrain_path:\n")
    with pytest.raises(UsageError, match="needs --train_path"):
        pack_data.main(["--config", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "p")])
