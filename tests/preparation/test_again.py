"""What was made before is made again where its source changed; archives and folders of all kinds hold the people."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

import prepare_data
from corpus.audio import AudioError
from corpus.decode import Recording
from errors import UsageError
from preparation.archives import unpacked
from preparation.conversion import cut_noise, write_anew
from preparation.corpora import Reading, Utterance, merged
from preparation.journal import Journal
from preparation.layouts import read_corpus
from preparation.outputs import write_config
from preparation.tree import root_of
from settings.command_line import run


def sound(path, seed=0, seconds=0.6):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    soundfile.write(path, x, 16000)
    return path


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "files.jsonl")
    yield journal
    journal.close()


def samples(path):
    return soundfile.read(path, dtype="int16")[0]


def test_corpora_in_folders_of_one_name_keep_their_people_apart(tmp_path, capsys):
    for name in ("a/wav/ann/1.wav", "b/wav/ann/1.wav", "b/wav/bob/1.wav", "c/ann/1.wav"):
        sound(tmp_path / name)
    sound(tmp_path / "a" / "wav" / "c-ann" / "1.wav")  # the name that the third ann would get
    found = merged([read_corpus(tmp_path / name, Reading()) for name in ("a/wav", "b/wav", "c")])
    assert [u.speaker for u in found] == ["a-wav-ann", "b-wav-ann", "bob", "c-ann", "c2-ann"]
    assert capsys.readouterr().out == (
        "1 name is in several corpora, taken for different people: ann; listed as a-wav-ann and b-wav-ann and c2-ann\n"
    )


def test_a_part_is_cut_again_where_its_source_or_its_place_changed(tmp_path, journal):
    source, tree = sound(tmp_path / "x.wav", 1, 3), tmp_path / "tree"

    def cut(start, seconds):
        rows = [Utterance(str(source), "ann", "u.wav", start=start, seconds=seconds)]
        assert write_anew(rows, rows, tree, journal, 1) == {}
        return rows[0].path

    first = cut(0.5, 1.0)
    before = samples(first)
    inode = tmp_path.joinpath(first).stat().st_mtime_ns
    assert cut(0.5, 1.0) == first and tmp_path.joinpath(first).stat().st_mtime_ns == inode
    assert len(samples(cut(0.5, 0.75))) == 12000 and not np.array_equal(samples(cut(1.5, 1.0)), before)
    sound(source, 2, 3)
    assert np.array_equal(samples(cut(0.5, 1.0)), samples(source)[8000:24000])


def test_noise_is_cut_again_where_it_changed(tmp_path, journal):
    source = sound(tmp_path / "musan" / "noise" / "a.wav", 1, 25)
    for seed, seconds in ((1, 25), (2, 21)):
        sound(source, seed, seconds)
        cut_noise(str(tmp_path / "musan"), tmp_path / "out", journal, 1)
    pieces = sorted((tmp_path / "out" / "musan_split" / "noise" / "a").iterdir())
    assert len(pieces) == 4 and np.array_equal(samples(pieces[0]), samples(source)[:80000])
    for name in ("a.flac", "a/b.wav"):
        sound(tmp_path / "musan" / "noise" / name, 3, 21)
    home = tmp_path / "out" / "musan_split" / "noise"
    for wanted in ({"a.wav", "a.flac", "a/b"}, {"a/b"}):  # the folder a is no recording
        cut_noise(str(tmp_path / "musan"), tmp_path / "out", journal, 1)
        assert {p.parent.relative_to(home).as_posix() for p in home.rglob("*.flac") if p.is_file()} == wanted
        for name in ("a.flac", "a.wav"):
            (tmp_path / "musan" / "noise" / name).unlink(missing_ok=True)


def test_files_that_differ_in_their_ending_keep_names_of_their_own(tmp_path, journal):
    alone = [Utterance(str(sound(tmp_path / "1.wav")), "ann", "1.wav", start=0.1)]
    write_anew(alone, alone, tmp_path / "tree", journal, 2)
    rows = [Utterance(str(sound(tmp_path / n, i)), "ann", n, start=0.1) for i, n in enumerate(("1.wav", "1.flac"))]
    rows.append(Utterance(str(tmp_path / "1.ogg"), "ann", "1.ogg"))
    write_anew(rows, rows, tmp_path / "tree", journal, 2)
    assert [u.name for u in rows] == ["1~wav.flac", "1~flac.flac", "1.ogg"]
    assert alone[0].name == "1.flac" and not Path(alone[0].path).exists()  # its place may be that of a link now
    assert not np.array_equal(samples(rows[0].path), samples(rows[1].path))


def packed(path, files):
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def people_in(path, out, journal):
    folder = unpacked(path, out, journal)
    return sorted({u.speaker for u in read_corpus(folder, Reading(unpacked=True)).utterances})


def test_an_archive_is_no_person_unless_it_holds_nothing_but_his_recordings(tmp_path, journal):
    data = sound(tmp_path / "x.wav").read_bytes()
    (tmp_path / "in").mkdir()
    packed(tmp_path / "in" / "ok.zip", {"p0/1.wav": data, "p1/1.wav": data})
    packed(tmp_path / "in" / "ok.tar.gz", {"p2/1.wav": data, "p3/1.wav": data})
    assert people_in(tmp_path / "in", tmp_path / "out", journal) == ["p0", "p1", "p2", "p3"]
    assert people_in(tmp_path / "in" / "ok.zip", tmp_path / "out", journal) == ["p0", "p1"]
    (tmp_path / "each").mkdir()
    for name in ("ann", "bob"):
        packed(tmp_path / "each" / f"{name}.zip", {"1.wav": data})
    assert people_in(tmp_path / "each", tmp_path / "out", journal) == ["ann", "bob"]
    (tmp_path / "other").mkdir()
    packed(tmp_path / "other" / "ok.zip", {"q0/1.wav": data, "q1/1.wav": data})  # beside the ok.zip from before
    assert people_in(tmp_path / "other" / "ok.zip", tmp_path / "out", journal) == ["q0", "q1"]
    packed(tmp_path / "other" / "ok.zip", {"q7/1.wav": data, "q8/1.wav": data, "q9/1.wav": data})
    assert people_in(tmp_path / "other" / "ok.zip", tmp_path / "out", journal) == ["q7", "q8", "q9"]


def test_a_level_with_a_single_folder_is_not_the_person(tmp_path):
    for name in ("p0", "p1"):
        sound(tmp_path / "in" / "a" / "b" / name / "1.wav")
    assert {u.speaker for u in read_corpus(tmp_path / "in", Reading()).utterances} == {"p0", "p1"}
    sound(tmp_path / "one" / "ann" / "wav" / "1.wav")
    assert {u.speaker for u in read_corpus(tmp_path / "one", Reading()).utterances} == {"ann"}


def test_a_damaged_end_and_a_password_are_one_line(tmp_path, journal):
    path = packed(tmp_path / "a.tar.gz", {"p0/1.wav": np.random.default_rng(0).bytes(3000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # the CRC of gzip
    with pytest.raises(UsageError, match=r"a\.tar\.gz: cannot be unpacked to .*CRC"):
        unpacked(path, tmp_path / "out", journal)
    path.write_bytes(gzip.compress(gzip.decompress(whole))[:600] + b"\xff" * 300)
    with pytest.raises(UsageError, match=r"a\.tar\.gz: cannot be unpacked to"):
        unpacked(path, tmp_path / "out", journal)
    secret = packed(tmp_path / "b.zip", {"p0/1.wav": b"x"})
    data = bytearray(secret.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1  # encrypted, say both headers
    secret.write_bytes(data)
    with pytest.raises(UsageError, match=r"b\.zip: cannot be unpacked to .*password"):
        unpacked(secret, tmp_path / "out", journal)


BASE = """# mine
lr: 0.1  # a word
train_list:   # two of them
  - a.txt
  - {list: b.txt, weight: 2}

# on tests
test_list:
  O: o.txt
  H: h.txt  # hard
best_list: H
save_path: >
  exps/a
model: X"""


def test_a_configuration_with_blocks_and_comments_has_other_values_for_some_keys(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    write_config(
        tmp_path / "c.yaml",
        tmp_path / "base.yaml",
        {"train_list": "t.txt", "test_list": "u.txt", "best_list": None, "save_path": "exps/b", "augment": True},
    )
    text = (tmp_path / "c.yaml").read_text()
    assert yaml.safe_load(text) == {
        "lr": 0.1, "train_list": "t.txt", "test_list": "u.txt", "save_path": "exps/b", "model": "X", "augment": True
    }  # fmt: skip
    assert "# mine\nlr: 0.1  # a word\n" in text and "# on tests" in text
    (tmp_path / "flow.yaml").write_text("{train_list: a.txt, model: X}\n")
    with pytest.raises(UsageError, match=r"flow.yaml' cannot be replaced one by one"):
        write_config(tmp_path / "d.yaml", tmp_path / "flow.yaml", {"train_list": "t.txt", "augment": True})


def test_what_is_no_configuration_and_no_checkpoint_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# A page\n\nof text\n")
    sound(tmp_path / "people" / "ann" / "1.wav")
    for flag in ("--config", "--initial_model"):
        words = [str(tmp_path / "people"), "--out", str(tmp_path / "out"), flag, str(tmp_path / "README.md")]
        assert run(prepare_data.main, words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "README.md" in line and not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_among_the_recordings_is_left_out_and_not_waited_for(tmp_path, capsys):
    for i in range(10):
        sound(tmp_path / "people" / f"p{i % 5}" / f"{i}.wav", i)
    pipe = tmp_path / "people" / "p0" / "x.wav"
    os.mkfifo(pipe)
    for wanted in (pipe, pipe.parent):
        with pytest.raises(AudioError, match="not a regular file"):
            Recording(wanted)
    assert run(prepare_data.main, [str(tmp_path / "people"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "bad_files.txt").read_text() == "p0/x.wav\tnot audio\tnot a regular file\n"
    assert run(prepare_data.main, [str(pipe), "--out", str(tmp_path / "out")]) == 2
    assert f"neither a folder nor a file: '{pipe}'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_and_a_link_to_itself_end_nothing(tmp_path, monkeypatch, capsys):
    for i in range(10):
        sound(tmp_path / "people" / f"p{i % 5}" / f"{i}.wav", i)
    (tmp_path / "people" / "loop").symlink_to("loop")
    (tmp_path / "people" / "shut").mkdir()
    scandir, shut = os.scandir, [tmp_path / "people" / "shut"]

    def guarded(path="."):
        if os.fspath(path) in map(str, shut):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    words = [str(tmp_path / "people"), "--out", str(tmp_path / "out")]
    assert run(prepare_data.main, words) == 0
    assert f"{shut[0]}: cannot be read, its recordings are left out" in capsys.readouterr().err
    journal = tmp_path / "out" / ".prepared" / "files.jsonl"
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*lines[:3], b"\xff spoilt", b'["key", {', *lines[3:]]) + b"\n")
    assert run(prepare_data.main, words) == 0
    assert f"{journal}:4: cannot be read" in capsys.readouterr().out
    assert run(prepare_data.main, words) == 0 and "cannot be read" not in capsys.readouterr().out
    shut.append(tmp_path / "people")
    assert run(prepare_data.main, words) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'people'}: cannot be read: Permission denied\n"
    assert run(prepare_data.main, [*words, "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "prepare_data.py: --seed must not be negative, got -1\n"


LONG = "x" * 5000
ROWS = [
    ("t.csv", "path,speaker,start,end\na.wav,ann,1,inf\n", r"t.csv:2: 'inf' is no number of seconds"),
    ("t.csv", "path,speaker,start,duration\na.wav,ann,1,-2\n", r"t.csv:2: '-2' is no number of seconds"),
    ("t.csv", "path,speaker,start,end\na.wav,ann,3,2\n", r"t.csv:2: the part ends at 2 s, before it starts at 3 s"),
    ("t.csv", "path,speaker,text\n\n\na.wav,,x\n", r"t.csv:4: no path or no speaker in it"),
    ("t.csv", "path,speaker\nx.wav,ann\na,b.wav,ann\n", r"t.csv:3: 3 cells between ',' for 2 columns; .* put quotes"),
    ("t.csv", 'path,speaker,text\na.wav,ann,"he\nb.wav,bob,hm\n', r"t.csv:2: the row .* a quote that does not end"),
    ("t.json", '[{"path": "a.wav", "speaker": "ann"}, 3]', r"t.json: entry 2: expected an object with a path"),
    ("t.json", '{"u1": {"path": "a.wav"}}', r"t.json: no column for the speaker among path"),
    ("t.json", '{"path": "a.wav",\n"speaker": "ann"}', r"t.json: expected a list of objects"),
    ("t.json", "[]", r"t.json: has no row"),
    ("t.json", " ", r"t.json: has no row"),
    ("t.jsonl", '{"path": "a.wav", "speaker": NaN}', r"t.jsonl:1: speaker is to be a text, not NaN"),
    ("t.jsonl", '{"path": {"file": "a"}, "speaker": "x"}', r't.jsonl:1: path is to be a text, not ."file": "a".'),
    ("t.jsonl", '{"path": "a\\u0000.wav", "speaker": "ann"}', r"t.jsonl:1: 'a.x00.wav' is the name of no file"),
    ("t.jsonl", '{"path": "a.wav", "speaker": "\\ud800"}', r"t.jsonl:1: '.ud800' is the name of no file"),
    ("t.jsonl", '\n{"path": "a.wav", "speaker": "ann"}\n{bad\n', r"t.jsonl:3: not JSON: "),
    ("wav.scp", "u1 'flac -c x.flac |\n", r"wav.scp:1: a pipe with a quote that does not end"),
    ("wav.scp", "u1 |\n", r"wav.scp:1: a pipe without a command"),
    ("spk2gender", "ann\n", r"spk2gender:1: expected 'speaker gender'"),
    ("segments", "u1 u1 0 nan\n", r"segments:1: 'nan' is no number of seconds"),
    ("validated.tsv", "path\tsentence\n1.mp3\thello\n", r"validated.tsv:2: no path or no client_id in it"),
]


@pytest.mark.parametrize("file, text, words", ROWS)
def test_a_row_that_cannot_be_used_is_named_by_its_line(tmp_path, file, text, words):
    if file in ("wav.scp", "spk2gender", "segments"):
        (tmp_path / "wav.scp").write_text("u1 x.wav\n")
        (tmp_path / "utt2spk").write_text("u1 ann\n")
    elif file == "validated.tsv":
        (tmp_path / "clips").mkdir()
    (tmp_path / file).write_text(text)
    with pytest.raises(UsageError, match=words):
        read_corpus(tmp_path / file if file.startswith("t.") else tmp_path, Reading())


def test_a_path_that_is_too_long_is_a_missing_file(tmp_path):
    (tmp_path / "t.csv").write_text(f"path,speaker\n{LONG}.wav,ann\n")
    (utterance,) = read_corpus(tmp_path / "t.csv", Reading()).utterances
    for path in (utterance.path, "a\0.wav"):
        with pytest.raises(AudioError, match="cannot be opened"):
            Recording(path)


def test_what_cannot_be_meant_is_refused_by_its_flag_and_value(tmp_path, capsys):
    for i in range(10):
        sound(tmp_path / "people" / f"p{i % 5}" / f"{i}.wav", i)
    people, out = str(tmp_path / "people"), ("--out", str(tmp_path / "out"))
    wrong = {
        (people, "--out", ""): "--out: is empty",
        (people, people + "/.", *out): "/people/.' is given twice",
        (people, *out, "--share", "0.99"): "--share 0.99: 5 of 5 people for the trials leave 0 to train on",
        (people, *out, "--workers", "0"): "--workers must be at least 1, got 0",
        (people, *out, "--min_seconds", "nan"): "--min_seconds must not be negative, got nan",
    }
    for words, said in wrong.items():
        assert run(prepare_data.main, list(words)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_missing_parts_and_what_is_no_archive_are_one_line(tmp_path, journal):
    for letter, data in (("a", b"PK\x03\x04"), ("c", b"x")):
        (tmp_path / f"vox_parta{letter}").write_bytes(data)
    with pytest.raises(UsageError, match=r"vox_partac: the part 'ab' of this archive is missing"):
        unpacked(tmp_path, tmp_path / "out", journal)
    (tmp_path / "vox_partaa").unlink()
    with pytest.raises(UsageError, match=r"vox_partac: the first part of this archive, vox_partaa, is missing"):
        unpacked(tmp_path, tmp_path / "out", journal)
    (tmp_path / "a.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"a.tar.gz: cannot be unpacked to '[^\n]*': damaged, or not whole"):
        unpacked(tmp_path / "a.tar.gz", tmp_path / "out", journal)


def test_a_folder_named_for_impulse_responses_holds_no_people(tmp_path):
    for name in ("rirs/office/1.wav", "people/mirrors/1.wav", "people/bob/1.wav"):
        sound(tmp_path / name)
    assert read_corpus(tmp_path / "rirs", Reading()).rirs == str(tmp_path / "rirs")
    assert read_corpus(tmp_path / "rirs", Reading(layout="folder")).layout == "folder"
    assert read_corpus(tmp_path / "people", Reading()).said == "a folder for each person, as 'bob' of bob/1.wav"


def test_what_was_made_of_a_file_gives_its_place_to_one_that_is_used_as_it_is(tmp_path):
    source, tree, journal = tmp_path / "p" / "1.ogg", tmp_path / "out" / "wav", Journal(tmp_path / "journal")
    source.parent.mkdir()
    sound(tmp_path / "x.wav", 1).rename(source)
    first = Utterance(str(source), "p", "1.ogg", start=0.1)
    assert write_anew([first], [first], tree, journal, 1) == {} and first.path == str(tree / "p" / "1.flac")
    other = Utterance(str(sound(tmp_path / "q" / "1.flac", 2)), "p", "1.flac")
    for _ in range(2):
        write_anew([other], [other], tree, journal, 1)
        root_of([other], tree)
        assert (tree / "p" / "1.flac").readlink() == tmp_path / "q" / "1.flac"


def test_members_of_tar_files_are_copied_and_the_lists_lead_to_them(tmp_path):
    lines = []
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(10):
            tar.add(sound(tmp_path / "x.wav", i), f"{i}.wav")
            (tmp_path / "spk").write_text("somebody")
            tar.add(tmp_path / "spk", f"{i}.spk")
            lines.append(f"p{i % 5} a.tar/{i}.wav\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    words = [str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert run(prepare_data.main, words) == 0
        listed = (tmp_path / "out" / "train_list.txt").read_text().split()[1::2]
        assert listed and all((tmp_path / "out" / "wav" / name).is_file() for name in listed)
    assert (tmp_path / "out/wav/p4/9.wav").read_bytes() == (tmp_path / "x.wav").read_bytes()
