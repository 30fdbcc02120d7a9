"""Tar files of recordings: the batches of single files, bit for bit, and the shard and member of every fault."""

import gzip
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from recordings import read_audio
from trainers import loaded_batches

import pack_data
from corpus.crop import Crop
from corpus.list_forms import why_no_list
from corpus.pack import Pack
from corpus.tars import INDEX, is_shard, shard_at
from corpus.train_list import read_train_list
from errors import UsageError
from settings.checks import check_paths
from settings.command_line import existing_recording
from settings.reader import load_config

webdataset = pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    """A folder of flac, wav of two rates and ogg, one of them cut, one with dots in its name; and its list."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(data / "wav", folder / "wav")
    lines = (data / "train_list.txt").read_text().splitlines()
    for number, (ending, rate) in enumerate([(".wav", 16000), (".x.wav", 8000), (".ogg", 16000)]):
        speaker, path = lines[number].split()
        x, _ = soundfile.read(folder / "wav" / path)
        lines[number] = f"{speaker} {path.removesuffix('.flac')}{ending}"
        soundfile.write(folder / "wav" / lines[number].split()[1], x, rate)
    victim = folder / "wav" / lines[4].split()[1]
    victim.write_bytes(victim.read_bytes()[:900])
    lines.append(lines[0])  # a line twice
    (folder / "list.txt").write_text("\n".join(lines))
    return folder


def pack(files, out, *more, listed="list.txt"):
    words = ["--train_list", str(files / listed), "--train_path", str(files / "wav"), "--out", str(out)]
    return pack_data.main([*words, "--format", "webdataset", *more])


def batches(settings, train_list, train_path="", *place, **more):
    return loaded_batches(settings, *place, train_list=train_list, train_path=train_path, **more)


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert torch.equal(a["data"], b["data"]) and torch.equal(a["label"], b["label"])
        kinds = [[(kind, *what[1:]) for kind, _, _, *what in batch["events"]] for batch in (a, b)]
        assert kinds[0] == kinds[1]


def test_batches_from_shards_are_those_from_files(settings, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pack_data.MB", 1 << 10)
    assert pack(files, tmp_path / "s", "--shard_mb", "300") == 0
    assert f"--train_list {tmp_path / 's'}" in capsys.readouterr().out
    shards = sorted((tmp_path / "s").glob("*.tar"))
    assert len(shards) > 1
    expected = batches(settings, files / "list.txt", files / "wav")
    assert {kind for batch in expected for kind, *_ in batch["events"]} >= {"unreadable", "resampled"}
    braces = f"{tmp_path}/s/shard-{{00000..{len(shards) - 1:05}}}.tar"
    for train_list, workers in ((tmp_path / "s", 0), (braces, 2)):
        found = batches(settings, train_list, workers=workers)
        same(expected, found)
    same(expected[2:], batches(settings, tmp_path / "s", first=2))  # begun in the middle of a shard
    whole, half = (batches(settings, tmp_path / "s", batch_size=size, world=8 // size) for size in (8, 4))
    assert all(torch.equal(a["data"][:, ::2], b["data"]) for a, b in zip(whole, half))
    for row, info in enumerate(found[0]["files"]):
        again, _ = Crop.from_dict(info).load(found[0]["data"].shape[-1])
        assert np.array_equal(again, found[0]["data"][0, row].numpy())
    assert pack_data.main(["--out", str(tmp_path / "s"), "--check"]) == 1
    assert capsys.readouterr().err.count("damaged: ") == 1


def test_shards_are_written_anew_where_their_files_changed(files, tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(files, work)
    assert pack(work, tmp_path / "s") == 0
    before = (tmp_path / "s" / "shard-00000.tar").read_bytes()
    (tmp_path / "s" / f"shard-00000.tar{INDEX}").unlink()
    capsys.readouterr()
    assert pack(work, tmp_path / "s") == 0 and "0 of them new" in capsys.readouterr().out
    (tmp_path / "s" / "shard-00000.tar").write_bytes(before[:-15000])  # as a copy that was not finished
    assert pack(work, tmp_path / "s") == 0 and "of them new" not in capsys.readouterr().out
    assert (tmp_path / "s" / "shard-00000.tar").read_bytes() == before
    first = (work / "list.txt").read_text().split()[1]
    (work / "wav" / first).unlink()
    assert pack(work, tmp_path / "s") == 0 and "No such file" in capsys.readouterr().err
    (tmp_path / "s" / "other.tar").write_bytes(before)
    with pytest.raises(UsageError, match=r"other\.tar is no shard of pack_data\.py"):
        pack(work, tmp_path / "s")


def test_the_library_reads_our_shards_and_we_read_those_of_wespeaker(files, tmp_path):
    pack(files, tmp_path / "s")
    rows = list(webdataset.WebDataset(str(tmp_path / "s" / "shard-00000.tar"), shardshuffle=False))
    lines = [line.split() for line in (files / "list.txt").read_text().splitlines()]
    assert [[json.loads(row["json"])[key] for key in ("speaker", "path")] for row in rows] == lines
    x = (0.1 * np.random.default_rng(0).normal(0, 1, 8000)).astype(np.float32)
    coded = io.BytesIO()
    soundfile.write(coded, x, 16000, format="WAV", subtype="FLOAT")
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for number in range(3):
            tar.write({"__key__": f"utt{number}", "wav": coded.getvalue(), "spk": f"p{number}".encode()})
    speakers, labels, paths, lines = read_train_list(tmp_path / "a.tar")
    assert (speakers, labels.tolist(), lines) == (["p0", "p1", "p2"], [0, 1, 2], [1, 2, 3])
    assert all(np.array_equal(read_audio(path)[0], x) for path in paths)
    members = {
        f"id{n}/v/0000{n}.wav{ending}": content
        for n in range(2)
        for ending, content in ((".spk", f"id{n}".encode()), (".wav", coded.getvalue()), (".meta.json", b"[]"))
    }
    for name, number in (("b.tar", 0), ("c.tar", 1)):  # its key of an utterance is the name of the file, with ending
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, content in members.items():
                if f"id{number}/" in member:
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    assert is_shard(tmp_path / "b.tar")
    listed = tmp_path / "shard.list"
    listed.write_text(f"{tmp_path / 'b.tar'}\nc.tar\n\n")  # the second is found beside the list
    speakers, labels, paths, lines = read_train_list(listed)
    assert (speakers, labels.tolist(), lines) == (["id0", "id1"], [0, 1], [1, 1])
    assert paths[1] == f"{tmp_path}/c.tar/id1/v/00001.wav.wav" and np.array_equal(read_audio(paths[1])[0], x)
    assert why_no_list(listed) == ""
    listed.write_text(f"{tmp_path / 'b.tar'}\nid1 c.tar\n")
    with pytest.raises(
        UsageError, match=r"shard\.list:2: expected a tar file as in the lines before, got 'id1 c\.tar'"
    ):
        read_train_list(listed)


def spoilt(kind, content, path):
    """Write a tar file with a fault."""
    if kind in ("cut", "between"):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            member = [m for m in tar if m.name.endswith((".flac", ".wav"))][2]
        content = content[: member.offset_data + 700 if kind == "cut" else member.offset + 100]
    elif kind == "packed":
        content = gzip.compress(content)
    path.write_bytes(content)
    entries = {"lone": ("a.wav", b"x"), "json": ("a.json", b"{"), "twice": ("a.wav", b"x"), "empty": ("a.txt", b"x")}
    if kind in entries:
        with tarfile.open(path, "w") as tar:
            for name in [entries[kind][0], "a.flac"] if kind == "twice" else [entries[kind][0]]:
                info = tarfile.TarInfo(name)
                info.size = len(entries[kind][1])
                tar.addfile(info, io.BytesIO(entries[kind][1]))


@pytest.mark.parametrize(
    "kind, said",
    [
        ("cut", r"bad\.tar: member 'train000/.*': truncated: the header promises \d+ bytes, 700 are there"),
        ("between", r"bad\.tar: not a whole tar file behind member '.*': no header and no end mark at byte \d+"),
        ("packed", r"bad\.tar: not a whole tar file: .*; a compressed one has to be unpacked"),
        ("lone", r"bad\.tar: member 'a\.wav': no speaker; 'a\.json' with \"speaker\", or 'a\.spk' names it"),
        ("json", r"bad\.tar: member 'a\.json': "),
        ("twice", r"bad\.tar: member 'a\.flac': a second recording of 'a'"),
        ("empty", r"bad\.tar: no recording in it"),
    ],
)
def test_a_broken_shard_is_named_with_its_member(files, tmp_path, kind, said):
    pack(files, tmp_path / "s")
    spoilt(kind, (tmp_path / "s" / "shard-00000.tar").read_bytes(), tmp_path / "bad.tar")
    with pytest.raises(UsageError, match=said) as error:
        read_train_list(tmp_path / "bad.tar")
    assert "\n" not in str(error.value)


def test_members_of_a_tar_of_a_folder_are_found_by_the_path_that_they_have_here(files, tmp_path):
    """`tar cf shard.tar .` writes `./a/b.flac`, `tar cPf shard.tar /a` writes `/a/b.flac`."""
    pack(files, tmp_path / "s")
    with tarfile.open(tmp_path / "s" / "shard-00000.tar") as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar][:8]
    for number, before in enumerate(("./", "/", "../", ".//x/../")):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(before + name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        found = read_train_list(tmp_path / f"{number}.tar")[2]
        wanted = [name for name, _ in members if not name.endswith(".json")]
        assert [path.removeprefix(f"{tmp_path / f'{number}.tar'}/") for path in found] == wanted
        assert len(read_audio(found[0])[0])


def test_a_list_above_the_folder_of_its_files_is_packed_once(files, tmp_path, capsys):
    path = (files / "list.txt").read_text().split()[1]
    (files / "up.txt").write_text(f"a ../wav/{path}\nb {path}\n")
    assert pack(files, tmp_path / "s", listed="up.txt") == 0 == pack(files, tmp_path / "s", listed="up.txt")
    assert "2 files, 0 of them new" in capsys.readouterr().out
    assert len(read_train_list(tmp_path / "s")[2]) == 2
    assert pack_data.main(["--out", str(tmp_path / "s"), "--check"]) == 0
    assert "2 files, 0 of them damaged" in capsys.readouterr().out


def test_what_is_no_train_list_is_said_with_what_it_is(files, tmp_path):
    pack(files, tmp_path / "s")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pack.json").write_text("{}")
    assert why_no_list(f"{tmp_path}/s/shard-{{00000..00000}}.tar") == "" == why_no_list(tmp_path / "s")
    as_braces = "as shard-{00000..00041}.tar"
    for path, said in {
        "s/shard-{00000..00002}.tar": "no such file: '{}/s/shard-00001.tar' and 1 more of "
        "'{}/s/shard-{00000..00002}.tar'",
        "s/s-{00..02.tar": f"'{{}}/s/s-{{00..02.tar': braces that do not match; {as_braces}",
        "s/shard-*.tar": f"no such file: '{{}}/s/shard-*.tar'; name the folder, or write braces {as_braces}",
        "a.tar.gz": "compressed; unpack it: '{}/a.tar.gz'",
        "p": "a pack of pack_data.py, which is a train_pack beside the list that it was made of: '{}/p'",
        "": "a folder, and without tar files, or wav.scp and utt2spk, no list: '{}/'",
        "none.txt": "no such file: '{}/none.txt'",
    }.items():
        assert why_no_list(f"{tmp_path}/{path}") == said.replace("{}", str(tmp_path))
    for path in ("s3://bucket/shard-{000..001}.tar", "pipe:cat a.tar"):
        assert why_no_list(path) == f"a stream, and rows are read at random places; copy its shards to a disk: '{path}'"
    with pytest.raises(UsageError, match="holds tar files, and those are a train_list, not a pack"):
        Pack(tmp_path / "s")


def test_any_list_and_command_takes_a_member_as_a_recording(settings, files, tmp_path, capsys):
    pack(files, tmp_path / "s")
    members = list(shard_at(str(tmp_path / "s" / "shard-00000.tar")).names)[6:10]
    trials = "".join(f"{int(k > 1)} shard-00000.tar/{members[0]} shard-00000.tar/{m}\n" for k, m in enumerate(members))
    (tmp_path / "trials.txt").write_text(trials)
    keys = {**settings, "test_list": str(tmp_path / "trials.txt"), "test_path": str(tmp_path / "s")}
    config, written, *_ = load_config([f"--{key}={value}" for key, value in keys.items()])
    check_paths(config, written)
    (tmp_path / "trials.txt").write_text(trials.replace(".tar", ".tar/no"))
    with pytest.raises(UsageError, match="none of the files of"):
        check_paths(config, written)
    path = f"{tmp_path}/s/shard-00000.tar/{members[0]}"
    assert existing_recording(path, "embed.py") == path
    with pytest.raises(UsageError, match=r"--wav: '.*/s/shard-00000\.tar' has no member 'a/b\.wav'"):
        existing_recording(f"{tmp_path}/s/shard-00000.tar/a/b.wav", "--wav")
    with pytest.raises(UsageError, match=r"--wav: no such file: 'none\.wav'"):
        existing_recording("none.wav", "--wav")


def test_a_damaged_index_is_made_again(files, tmp_path):
    pack(files, tmp_path / "s")
    path = tmp_path / "s" / "shard-00000.tar"
    moved = tmp_path / "moved.tar"
    moved.write_bytes(path.read_bytes())
    for content in (b"", (tmp_path / "s" / f"shard-00000.tar{INDEX}").read_bytes()):  # that of another time of change
        (tmp_path / f"moved.tar{INDEX}").write_bytes(content)
        assert list(shard_at(str(moved)).names) == list(shard_at(str(path)).names)


def test_tar_files_of_others_are_neither_written_over_nor_taken_away(files, tmp_path):
    x = (files / "wav" / (files / "list.txt").read_text().split()[1]).read_bytes()
    for name in ("shard-00000.tar", "shard-000001.tar"):
        (tmp_path / name[:-4]).mkdir()
        with webdataset.TarWriter(str(tmp_path / name[:-4] / name), encoder=False, mtime=0) as tar:
            tar.write({"__key__": "a", "flac": x, "json": b'{"speaker": "ann"}'})
        before = (tmp_path / name[:-4] / name).read_bytes()
        with pytest.raises(UsageError, match=rf"--out: .*/{name} is no shard of pack_data\.py; choose another folder"):
            pack(files, tmp_path / name[:-4])
        assert (tmp_path / name[:-4] / name).read_bytes() == before
    pack(files, tmp_path / "s")
    with pytest.raises(UsageError, match=r"shard-00000\.tar is of the list that is to be packed; choose another"):
        pack_data.main(["--train_list", str(tmp_path / "s"), "--train_path", "/", "--out", str(tmp_path / "s"),
                        "--format", "webdataset"])  # fmt: skip


def test_members_of_tar_files_are_packed_and_packed_anew_where_they_changed(files, tmp_path, capsys):
    pack(files, tmp_path / "s")
    words = ["--train_list", str(tmp_path / "s"), "--train_path", "/"]
    outs = [["--out", str(tmp_path / "p")], ["--out", str(tmp_path / "t"), "--format", "webdataset"]]
    for more in outs:
        assert pack_data.main([*words, *more]) == 0
        assert capsys.readouterr().err.count("unreadable: ") == ("webdataset" not in more)  # the cut one, where decoded
        assert pack_data.main([*words, *more]) == 0 and " of them new" in capsys.readouterr().out
    first = (files / "list.txt").read_text().splitlines()[1].split()
    work = tmp_path / "work"
    shutil.copytree(files, work)
    soundfile.write(work / "wav" / first[1], np.zeros(9000), 8000)
    pack(work, tmp_path / "s")
    for more in outs:
        capsys.readouterr()
        assert pack_data.main([*words, *more]) == 0 and ", 0 of them new" not in capsys.readouterr().out
    row = (work / "list.txt").read_text().splitlines().index(" ".join(first))
    assert Pack(tmp_path / "p").index["frames"][row] == 9000
    assert shard_at(str(tmp_path / "t" / "shard-00000.tar")).sizes[row] == (work / "wav" / first[1]).stat().st_size


def test_names_of_members_never_meet_and_speakers_keep_their_bytes(tmp_path, capsys):
    names = ["a.wav", "a.flac", "a-2.wav", "b.c.wav", "b_c.wav", "empty.wav", "gone.wav"]
    for name in names[:5]:
        soundfile.write(tmp_path / name, np.zeros(100), 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    speakers = [b"caf\xe9", b"caf\xea", *[b"ann"] * 5]
    lines = [b"%b %b\n" % (speaker, name.encode()) for speaker, name in zip(speakers, names)]
    (tmp_path / "list.txt").write_bytes(b"".join(lines))
    words = ["--train_list", str(tmp_path / "list.txt"), "--train_path", str(tmp_path), "--format", "webdataset"]
    said = []
    for _ in range(2):
        assert pack_data.main([*words, "--out", str(tmp_path / "s")]) == 0
        said.append(capsys.readouterr().err)
    assert "empty.wav" in said[0] and all(text.count("unreadable: ") == 2 for text in said)
    people, labels, paths, _ = read_train_list(tmp_path / "s")
    assert (people, labels.tolist()) == (["ann", "caf\udce9", "caf\udcea"], [1, 2, 0, 0, 0, 0, 0])
    assert len(set(paths)) == 7
    with webdataset.TarWriter(str(tmp_path / "half.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "wav": b"x", "json": b'{"speaker": "\\ud800"}'})
    with pytest.raises(UsageError, match=r"half\.tar: member 'a\.json': '.ud800' is no name: it has half of a char"):
        read_train_list(tmp_path / "half.tar")
