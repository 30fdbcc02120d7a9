"""Train lists of every form and size: read once, in arrays."""

import json

import numpy as np
import pytest

from corpus import list_forms, train_list
from corpus.front_coding import FrontCodedTexts
from corpus.lists import columns_of, list_hash
from corpus.sources import TrainSource
from corpus.texts import Texts
from corpus.train_list import read_train_lists
from errors import UsageError


def read(*lists, **more):
    return read_train_lists(tuple(TrainSource(str(path), "root", **more) for path in lists))


@pytest.mark.parametrize("kind", [Texts, FrontCodedTexts])
def test_texts_are_a_sequence_of_any_names(kind):
    names = ["a", "", "Anna Müller/ä.wav", "\udce9.wav", "日本"] * 3
    texts = kind.of(names)
    assert list(texts) == names and texts[2] == names[2] and texts[-1] == "日本" and len(texts) == 15
    assert texts[1:6:2] == names[1:6:2] and list(texts.between(3, 7)) == names[3:7]
    with pytest.raises(IndexError):
        texts[15]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("chunk", [7, 40, 1 << 22])
def test_a_list_read_in_pieces_is_that_of_a_reader_of_lines(tmp_path, monkeypatch, end, chunk):
    monkeypatch.setattr(list_forms, "CHUNK", chunk)
    lines = ["b x/1.wav", "a y/2.wav", "", "  c   z/3.wav ", "Anna Müller\tAnna Müller/ä 1.wav", "b\u3000q.wav"]
    lines += [f"s{i:02} s{i:02}/{i}.wav" for i in range(40)]
    path = tmp_path / "list"
    path.write_bytes(("\ufeff" + end.join(lines)).encode())
    rows = [(number, columns_of(line)) for number, line in enumerate(lines, 1) if columns_of(line)]
    found = read(path)
    names = sorted({columns[0] for _, columns in rows})
    assert list(found.speakers) == names and list(found.paths) == [columns[1] for _, columns in rows]
    assert [found.speakers[label] for label in found.labels] == [columns[0] for _, columns in rows]
    numbers = [number for number, _ in rows]
    assert found.lines.tolist() == [found.lines[i] for i in range(len(rows))] == numbers
    assert [found.lines.places_of(number) for number in range(1, 50)] == [
        [numbers.index(number)] if number in numbers else [] for number in range(1, 50)
    ]
    assert found.hash == list_hash(path)
    path.write_text("\n".join([*lines[:3], "s a b", *lines[3:]]))
    with pytest.raises(UsageError, match=r"list:4: expected 'speaker path', got 3 columns"):
        read(path)


def test_a_list_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path, reads = tmp_path / "list", []
    path.write_text("a 1.wav\nb 2.wav\n")
    inner = train_list._read
    monkeypatch.setattr(train_list, "_read", lambda sources: reads.append(1) or inner(sources))
    assert read(path) is read(path) and len(reads) == 1
    path.write_text("a 1.wav\nb 2.wav\nc 3.wav\n")
    assert len(read(path)) == 3 and len(reads) == 2


def test_kaldi_and_json_lists_are_read_as_they_are(tmp_path):
    kaldi, lines = tmp_path / "kaldi", tmp_path / "list.jsonl"
    kaldi.mkdir()
    (kaldi / "wav.scp").write_text("u1 /data/a 1.wav\nu2 b.wav\nu3 c.wav\n")
    (kaldi / "utt2spk").write_text("u1 anna\nu3 bert\nu2 anna\n")
    entries = [{"wav": "/data/a 1.wav", "spk": "anna"}, {"path": "b.wav", "speaker": "anna"}]
    entries.append({"audio_filepath": "c.wav", "label": "bert", "duration": 3.0, "offset": 0})
    lines.write_text("\n".join(map(json.dumps, entries)))
    for name in ("raw.list", "train_manifest.json"):  # as wespeaker and NeMo call theirs
        (tmp_path / name).write_text("\n" + lines.read_text())
    others = [read(tmp_path / name) for name in ("raw.list", "train_manifest.json")]
    for found in (read(kaldi), read(kaldi / "wav.scp"), read(lines), *others):
        assert list(found.speakers) == ["anna", "bert"] and found.labels.tolist() == [0, 0, 1]
        assert list(found.paths) == ["/data/a 1.wav", "b.wav", "c.wav"]
        assert (found.file(0), found.file(1)) == ("/data/a 1.wav", "root/b.wav")
    assert read(kaldi).place(1) == f"{kaldi / 'wav.scp'}:2"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "x.jsonl",
            '{"wav": "a.wav", "spk": "s"}\n{"wav": "a.wav"}\n',
            ":2: no speaker; it is looked for under",
        ),
        (
            "x.jsonl",
            '{"wav": "a", "spk": "s", "offset": 2.5}\n',
            ":1: a part of a recording; python prepare_data",
        ),
        (
            "x.jsonl",
            '{"wav": "a", "spk": "s", "start": 0, "stop": 8000}\n',
            ":1: a part of a recording; python prepare_data",
        ),
        ("x.jsonl", "[1]\n", "x.jsonl:1: expected an object with a path and a speaker"),
        ("x.jsonl", "{\n", "x.jsonl:1: not a line of JSON"),
        (
            "x.json",
            '{\n "u1": {"wav": "a.wav", "spk_id": "s"}\n}\n',
            "x.json: one JSON value, not a line of JSON for each",
        ),
        ("x.json", '{"u1": {"wav": "a.wav", "spk_id": "s"}}\n', "list that python prepare_data.py"),
        ("x.csv", "ID,duration,wav,start,stop,spk_id\n1,2,a.wav,0,9,s\n", "x.csv: a table; the train list that python"),
        ("x.tsv", "path\tspeaker\ttext\na.wav\ts\tx\n", "x.tsv: a table; the train list that python prepare_data.py"),
        ("wav.scp", "u1 sox a.sph |\n", "wav.scp:1: a command, which is not run here"),
        ("wav.scp", "u2 a.wav\n", "wav.scp:1: utterance 'u2' has no line in"),
        ("utt2spk", "u1 s\nu2 s\n", "utt2spk: utterance 'u2' has no line in"),
        ("utt2spk", "u1\n", "utt2spk:1: expected 'utterance speaker', got 1 column"),
        ("segments", "x u1 0 1\n", "segments: parts of recordings; python prepare_data.py"),
    ],
)
def test_mistakes_in_lists_of_other_forms_name_file_and_line(tmp_path, name, text, words):
    (tmp_path / "wav.scp").write_text("u1 a.wav\n")
    (tmp_path / "utt2spk").write_text("u1 s\n")
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as error:
        read(tmp_path / name if name.startswith("x.") else tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_speaker_may_be_called_as_json_begins(tmp_path):
    path = tmp_path / "list"
    path.write_text("{a} 1.wav\n[b 2.wav\nc,path,speaker 3.wav\n")
    assert list(read(path).speakers) == ["[b", "c,path,speaker", "{a}"]


def test_several_lists_are_one_set(tmp_path):
    (tmp_path / "a").write_text("s1 1.wav\ns2 2.wav\n")
    (tmp_path / "b").write_text("\ns1 1.wav\ns0 3.wav\n")
    sources = (TrainSource(str(tmp_path / "a"), "one"), TrainSource(str(tmp_path / "b"), "two", weight=2.0))
    both = read_train_lists(sources)
    assert list(both.speakers) == ["s0", "s1", "s2"] and both.labels.tolist() == [1, 2, 1, 0]
    assert both.file(0) == "one/1.wav" and both.file(2) == "two/1.wav" and both.place(3) == f"{tmp_path / 'b'}:3"
    assert both.place_of("two/1.wav", 2) == f"{tmp_path / 'b'}:2" and both.parts.tolist() == [0, 0, 1, 1]
    assert [list(numbers) for _, numbers in both.by_source()] == [[0, 1], [2, 3]]
    apart = read_train_lists((sources[0], TrainSource(str(tmp_path / "b"), "two", prefix="b-")))
    assert list(apart.speakers) == ["b-s0", "b-s1", "s1", "s2"] and apart.hash != both.hash
    assert np.array_equal(read(tmp_path / "a").labels, [0, 1]) and read(tmp_path / "a").parts is None
