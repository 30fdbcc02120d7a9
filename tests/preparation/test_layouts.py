"""Each corpus in its own folders and tables, made small, is recognised and read as it should be."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import prepare_data
from errors import UsageError
from preparation.conversion import write_anew
from preparation.corpora import Reading, keep_only, merged
from preparation.journal import Journal
from preparation.layouts import read_corpus
from preparation.trials import divide
from settings.command_line import run


def sound(path, seed=0, seconds=0.6):
    """A short recording, another for each seed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    x = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    soundfile.write(path, x, 16000, format={".mp3": "MP3"}.get(path.suffix))
    return path


def voxceleb(root):
    for name in ("wav/id10001/abcdefghijk/00001.wav", "vox1_test/wav/id10270/bcdefghijkl/00001.wav"):
        sound(root / name)
    sound(root / "dev" / "aac" / "id00012" / "cdefghijklm" / "00001.wav")
    (root / "dev" / "aac" / "id00012" / "cdefghijklm" / "00001.m4a").write_bytes(b"the same")
    (root / "vox1_meta.csv").write_text("VoxCeleb1 ID\tName\tGender\nid10001\tA B\tm\nid10270\tC\tf\n")
    (root / "vox2_meta.csv").write_text("VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \nid00012 ,n000012 ,f ,dev \n")


def librispeech(root):
    sound(root / "LibriSpeech" / "train-clean-100" / "19" / "198" / "19-198-0000.flac")
    sound(root / "LibriSpeech" / "test-other" / "367" / "130732" / "367-130732-0001.flac")
    (root / "LibriSpeech" / "SPEAKERS.TXT").write_text(";ID |SEX|\n19  | F | train-clean-100 | 1 | X\n367 | M | x\n")


def cnceleb(root):
    for name in ("data/id00001/singing-01-002.flac", "data/id00800/interview-03-001.flac", "eval/test/x.flac"):
        sound(root / "CN-Celeb_flac" / name)
    (root / "CN-Celeb_flac" / "dev").mkdir()
    (root / "CN-Celeb_flac" / "dev" / "dev.lst").write_text("id00001\n")


def cnceleb_eval(root):
    cnceleb(root)
    evaluation = root / "CN-Celeb_flac" / "eval"
    (evaluation / "test" / "x.flac").unlink()
    for name in ("enroll/id00800-enroll.flac", "test/id00800-play-01-002.flac", "test/id00801-play-01-001.flac"):
        sound(evaluation / name)
    (evaluation / "lists").mkdir()
    (evaluation / "lists" / "trials.lst").write_text(
        "id00800-enroll test/id00800-play-01-002.wav 1\nid00800-enroll test/id00801-play-01-001.wav 0\n"
    )


def commonvoice(root):
    sound(root / "cv" / "de" / "clips" / "common_voice_de_1.mp3")
    head = "client_id\tpath\tsentence\tgender"
    row = 'aa11bb22\tcommon_voice_de_1.mp3\tSie sagte: "ja\tfemale_feminine'
    (root / "cv" / "de" / "validated.tsv").write_text(f"{head}\n{row}\n")


def kaldi(root):
    whole = sound(root / "audio" / "call1.flac", seconds=2)
    (root / "wav.scp").write_text(f"call1 flac -c -d -s {whole} |\ncall2 audio/call2.wav\n")
    (root / "utt2spk").write_text("ann-call1-1 ann\nbob-call1-2 bob\n")
    (root / "segments").write_text("ann-call1-1 call1 0.1 0.9\nbob-call1-2 call1 1.0 1.75\n")
    (root / "spk2gender").write_text("ann f\nbob m\n")


def nemo(root):
    sound(root / "a" / "ann" / "mon" / "1.wav", seconds=2)
    rows = [{"audio_filepath": "a/ann/mon/1.wav", "offset": 0, "duration": 2.01, "label": "ann"}]
    rows += [{"audio_filepath": "a/ann/mon/1.wav", "offset": 0.5, "duration": 0.75, "label": "ann"}]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def speechbrain(root):
    sound(root / "x.wav")
    (root / "train.csv").write_text("ID,duration,wav,start,stop,spk_id\nu1,0.5,$data_root/x.wav,1600,8000,ann\n")


def train_list(root):
    sound(root / "wav" / "ann" / "mon" / "1 a.wav")
    (root / "list.txt").write_text("ann\twav/ann/mon/1 a.wav\n")


LAYOUTS = [
    (train_list, "list.txt", "list", ["ann/mon/1 a.wav   mon"]),
    (voxceleb, "", "voxceleb", ["id00012/cdefghijklm/00001.wav f train cdefghijklm"]),
    (voxceleb, "", "voxceleb", ["id10270/bcdefghijkl/00001.wav f test bcdefghijkl"]),
    (voxceleb, "", "voxceleb", ["id10001/abcdefghijk/00001.wav m  abcdefghijk"]),
    (librispeech, "", "librispeech",
     ["19/198/19-198-0000.flac f train 198", "367/130732/367-130732-0001.flac m test 130732"]),
    (cnceleb, "", "cnceleb",
     ["id00001/singing-01-002.flac  train singing-01", "id00800/interview-03-001.flac  test interview-03"]),
    (cnceleb_eval, "", "cnceleb",
     ["id00001/singing-01-002.flac  train singing-01", "id00800/enroll/id00800-enroll.flac  test ",
      "id00800/test/id00800-play-01-002.flac  test play-01", "id00801/test/id00801-play-01-001.flac  test play-01"]),
    (commonvoice, "", "commonvoice", ["aa11bb22/common_voice_de_1.mp3 f  "]),
    (kaldi, "", "kaldi", ["ann/ann-call1-1.flac f  call1 0.1+0.8", "bob/bob-call1-2.flac m  call1 1+0.75"]),
    (nemo, "train.jsonl", "json", ["ann/mon/1.wav   mon", "ann/mon/1_00000500.wav   mon 0.5+0.75"]),
    (speechbrain, "train.csv", "csv", ["ann/x_00000100.wav   x 0.1+0.4"]),
]  # fmt: skip


@pytest.mark.parametrize("build, file, layout, expected", LAYOUTS)
def test_a_corpus_is_recognised_and_read(tmp_path, build, file, layout, expected):
    build(tmp_path)
    corpus = read_corpus(tmp_path / file, Reading())
    assert corpus.layout == layout
    found = []
    for u in merged([corpus]):
        part = f" {u.start:g}+{u.seconds:g}" if u.is_part else ""
        found.append(f"{u.listed} {u.gender} {u.part} {u.session}{part}")
        assert Path(u.path).exists() or "call2" in u.path
    assert set(expected) <= set(found) and len(found) == (3 if build is voxceleb else len(expected)), found


def test_the_trials_of_cnceleb_are_its_own(tmp_path):
    cnceleb_eval(tmp_path)
    corpus = read_corpus(tmp_path, Reading())
    division = divide(corpus.utterances, [], tmp_path / "trials.txt", 0, 1, corpus.trials)
    assert [u.speaker for u in division.train] == ["id00001"]
    assert (tmp_path / "trials_CN-Celeb.txt").read_text() == (
        "1 id00800/enroll/id00800-enroll.flac id00800/test/id00800-play-01-002.flac\n"
        "0 id00800/enroll/id00800-enroll.flac id00801/test/id00801-play-01-001.flac\n"
    )
    assert "CN-Celeb: 2 trials, of 2 people" in division.said


def test_voxblink_s_list_chooses_utterances(tmp_path):
    for name in ("00000", "00001"):
        sound(tmp_path / "audio" / "id000001" / "a-b_cdefghi" / f"{name}.wav")
    (tmp_path / "audio" / "spk2gender").write_text("id000001,female\n")
    (tmp_path / "utt_clean").write_text("id000001-a-b_cdefghi-00001\n")
    corpus = read_corpus(tmp_path / "audio", Reading())
    assert corpus.said.startswith("VoxBlink2: 2 recordings, 1 person")
    keep_only(corpus, str(tmp_path / "utt_clean"))
    assert [(u.listed, u.gender) for u in corpus.utterances] == [("id000001/a-b_cdefghi/00001.wav", "f")]
    assert corpus.said.endswith("; 1 of them by --only")
    (tmp_path / "utt_clean").write_text("id000009/x/1.wav")
    with pytest.raises(UsageError, match=r"--only: .* names none of the 1 recordings"):
        keep_only(corpus, str(tmp_path / "utt_clean"))


def test_parquet_files_of_hugging_face(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = sound(tmp_path / "x.wav").read_bytes()
    rows = {"audio": [{"bytes": data, "path": "x y.wav"}] * 2, "speaker_id": [7, 8], "gender": ["Male", None]}
    (tmp_path / "set" / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.table(rows), tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    corpus = read_corpus(tmp_path / "set", Reading(work=str(tmp_path / "out")))
    names = [f"{i}/test-00000-of-00001-00000{i - 6}-x y.wav" for i in (7, 8)]
    assert [u.listed for u in corpus.utterances] == names and corpus.utterances[0].gender == "m"
    assert corpus.utterances[0].part == "test" and (tmp_path / "out" / names[1]).read_bytes() == data


FOLDERS = [
    (["ann/1.wav", "bob/2.wav"], {"ann", "bob"}, ""),
    (["train/ann/1.wav", "test/bob/2.wav"], {"ann", "bob"}, "test"),
    (["data/wav/female/ann/mon/1.wav", "data/wav/male/bob/tue/2.wav"], {"ann", "bob"}, ""),
    (["ann/mon/1.wav", "ann/tue/1.wav", "bob/2.wav"], {"ann", "bob"}, ""),
]


@pytest.mark.parametrize("names, people, part", FOLDERS)
def test_the_level_of_the_person_is_found(tmp_path, names, people, part):
    for name in names:
        sound(tmp_path / name)
    corpus = read_corpus(tmp_path, Reading())
    assert {u.speaker for u in corpus.utterances} == people
    assert next(u.part for u in corpus.utterances if u.speaker == "bob") == part
    if "female" in names[0]:
        assert [(u.gender, u.session) for u in corpus.utterances] == [
            ("f", "data/wav/female/mon"),
            ("m", "data/wav/male/tue"),
        ]


def test_the_level_of_the_person_can_be_set_and_the_name_of_a_file_can_hold_him(tmp_path):
    for name in ("en/ann_1.wav", "en/bob_1.wav", "de/cy_1.wav"):
        sound(tmp_path / name)
    by_level = read_corpus(tmp_path, Reading(speaker_level=1))
    assert {u.speaker for u in by_level.utterances} == {"en", "de"}
    by_name = read_corpus(tmp_path, Reading(speaker_pattern=r"/([a-z]+)_"))
    assert {u.speaker for u in by_name.utterances} == {"ann", "bob", "cy"}
    with pytest.raises(UsageError, match=r"--speaker_level 2: .* lies in 1 folder only"):
        read_corpus(tmp_path, Reading(speaker_level=2))
    with pytest.raises(UsageError, match=r"no person by --speaker_pattern '\(x\)'"):
        read_corpus(tmp_path, Reading(speaker_pattern="(x)"))


PIPES = [
    ("sph2pipe -f wav -p -c 1 call.wav |", 0.1),
    ("/opt/bin/sph2pipe -p -c2 -f wav call.wav|", 0.2),
    ("sph2pipe -f wav -c 1 alone.wav |", None),
    ("flac -c -d -s alone.flac |", None),
]


@pytest.mark.parametrize("pipe, level", PIPES)
def test_a_channel_that_sph2pipe_takes_is_the_one_that_is_written(tmp_path, monkeypatch, pipe, level):
    monkeypatch.chdir(tmp_path)
    both = np.tile([0.1, 0.2], (16000, 1))
    soundfile.write("call.wav", both, 16000)
    for name in ("alone.wav", "alone.flac"):
        soundfile.write(name, both[:, 0], 16000)
    (tmp_path / "wav.scp").write_text(f"u1 {pipe}\n")
    (tmp_path / "utt2spk").write_text("u1 ann\n")
    (utterance,) = read_corpus(tmp_path, Reading()).utterances
    assert utterance.is_part == (level is not None)
    if level is not None:
        assert write_anew([utterance], [utterance], tmp_path / "wav", Journal(tmp_path / "journal"), 1) == {}
        x, _ = soundfile.read(utterance.path)
        assert x.shape == (16000,) and np.allclose(x, level, atol=1e-4)


WRONG = [
    ("wav.scp", "u1 flac -c -d -s --skip=8000 a.flac |\n", r"wav.scp:1: a pipe, .* with '--skip=8000'"),
    ("wav.scp", "u1 sph2pipe -f wav -t 1:2 a.sph |\n", r"wav.scp:1: a pipe, .* with '-t'"),
    ("wav.scp", "u1 sph2pipe a.sph - | sox -t wav - -r 8000 - |\n", r"wav.scp:1: a pipe, which is not run here"),
    ("segments", "ann-call1-1 call9 0 1\n", r"segments:1: expected 'utterance recording start end'"),
    ("segments", "ann-call1-1 call1 2 1\n", r"segments:1: the segment ends before it starts"),
    ("segments", "eve-call1-1 call1 0 1\n", r"utt2spk: has no line 'utterance speaker' for 'eve-call1-1'"),
    ("segments", "\n", r"segments: has no line"),
    ("wav.scp", "", r"wav\.scp: has no line"),
    ("utt2sess", "ann-call1-1\n", r"utt2sess:1: expected 'utterance session'"),
    ("wav.scp", "call1 sox x.wav -r 8000 -t wav - |\n", r"wav.scp:1: a pipe, which is not run here"),
]


def test_kaldi_says_sessions_and_genders_of_names_that_no_folder_has(tmp_path):
    kaldi(tmp_path)
    (tmp_path / "utt2spk").write_text("ann-call1-1 sre:ann\nbob-call1-2 bob\n")
    (tmp_path / "spk2gender").write_text("sre:ann f\nbob m\n")
    (tmp_path / "utt2sess").write_text("ann-call1-1 monday\n")
    found = {u.speaker: u for u in read_corpus(tmp_path, Reading()).utterances}
    assert {name: (u.session, u.gender) for name, u in found.items()} == {
        "sre_ann": ("monday", "f"),
        "bob": ("call1", "m"),
    }


@pytest.mark.parametrize("file, text, words", WRONG)
def test_a_wrong_line_of_kaldi_is_named(tmp_path, file, text, words):
    kaldi(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UsageError, match=words):
        read_corpus(tmp_path, Reading())


def test_start_and_stop_of_speechbrain_are_samples_of_the_file(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(48000 * 2), 48000)
    for name, text in {
        "t.csv": "ID,duration,wav,start,stop,spk_id\n1,1.0,x.wav,24000,72000,ann\n",
        "t.json": '{\n "u1": {"wav": "{data_root}/x.wav", "start": 24000, "stop": 72000, "spk_id": "ann"}\n}\n',
    }.items():
        (tmp_path / name).write_text(text)
        (utterance,) = read_corpus(tmp_path / name, Reading()).utterances
        assert (utterance.start, utterance.seconds, utterance.path) == (0.5, 1.0, str(tmp_path / "x.wav"))


def test_start_and_stop_of_3dspeaker_are_seconds(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(16000 * 4), 16000)
    rows = "1,4.0,x.wav,1.0,3.0,ann\n2,4.0,x.wav,0,4.0,ann\n"
    (tmp_path / "train.csv").write_text("ID,dur,path,start,stop,spk\n" + rows)
    part, whole = read_corpus(tmp_path / "train.csv", Reading()).utterances
    assert (part.start, part.seconds, part.speaker) == (1.0, 2.0, "ann") and not whole.is_part


def test_files_without_a_known_ending_are_read_by_what_they_hold(tmp_path):
    sound(tmp_path / "x.wav")
    (tmp_path / "raw.list").write_text('{"key": "u1", "spk": "ann", "wav": "x.wav"}\n')
    (tmp_path / "wav.scp").write_text("u1 x.wav\n")
    (tmp_path / "utt2spk").write_text("u1 ann\n")
    for name in ("raw.list", "wav.scp", "utt2spk"):
        (utterance,) = read_corpus(tmp_path / name, Reading()).utterances
        assert (utterance.speaker, utterance.path) == ("ann", str(tmp_path / "x.wav"))
    (tmp_path / "notes").write_text("ann x.wav\n")
    with pytest.raises(UsageError, match=r"is no folder, no archive and no \.jsonl"):
        read_corpus(tmp_path / "notes", Reading())


@pytest.mark.parametrize(
    "text", ["[ROW,\nROW]", "\n [ROW, ROW]\n", '{"a": ROW, "b": ROW}', "ROW\nROW\n", '\n{"a": ROW,\n"b": ROW}']
)
def test_a_json_file_is_a_list_an_object_of_objects_or_lines(tmp_path, text):
    (tmp_path / "t.json").write_text(text.replace("ROW", '{"path": "x.wav", "speaker": "ann"}'))
    assert [u.speaker for u in read_corpus(tmp_path / "t.json", Reading()).utterances] == ["ann", "ann"]


def test_a_table_without_a_speaker_and_a_layout_that_does_not_fit_are_named(tmp_path):
    (tmp_path / "t.csv").write_text("path,text\na.wav,hello\n")
    with pytest.raises(UsageError, match=r"t.csv: no column for the speaker among path, text: call it 'speaker'"):
        read_corpus(tmp_path / "t.csv", Reading())
    with pytest.raises(UsageError, match=r"--corpus kaldi: .* does not look so, wanted: there are wav.scp and utt2spk"):
        read_corpus(tmp_path, Reading(layout="kaldi"))


@pytest.mark.parametrize("text", ["{bad", "[" * 100_000, "3\n", '{"path": "a.wav", "speaker": ""}'])
def test_what_is_no_table_of_recordings_is_one_line(tmp_path, text):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(UsageError, match=r"t\.jsonl"):
        read_corpus(tmp_path / "t.jsonl", Reading())


def test_one_name_in_two_corpora_is_two_people_and_one_place_holds_one_file(tmp_path):
    for name in ("a/train/ann/1.wav", "a/test/ann/1.wav", "b/ann/1.wav", "b/bob/1.wav"):
        sound(tmp_path / name)
    both = merged([read_corpus(tmp_path / name, Reading()) for name in "ab"])
    assert [u.listed for u in both] == ["a-ann/1.wav", "a-ann/1~2.wav", "b-ann/1.wav", "bob/1.wav"]


def test_two_speakers_never_share_a_folder(tmp_path):
    names = ["a/b", "a_b", "e.", "e", "a/b"]
    rows = [json.dumps({"path": f"{i}.wav", "speaker": name}) for i, name in enumerate(names)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    (tmp_path / "list.txt").write_text("".join(f"{name} {i}.wav\n" for i, name in enumerate(names)))
    (tmp_path / "wav.scp").write_text("".join(f"u{i} {i}.wav\n" for i in range(5)))
    (tmp_path / "utt2spk").write_text("".join(f"u{i} {name}\n" for i, name in enumerate(names)))
    (tmp_path / "cv" / "clips").mkdir(parents=True)
    clients = [f"somebody-from-a-city-number-{name}\t{i}.mp3\n" for i, name in enumerate(names)]
    (tmp_path / "cv" / "validated.tsv").write_text("client_id\tpath\n" + "".join(clients))
    for source in ("t.jsonl", "list.txt", "", "cv"):
        found = [u.speaker for u in read_corpus(tmp_path / source, Reading()).utterances]
        assert found[0] == found[4] and len(set(found)) == 4, found
    assert [u.speaker for u in read_corpus(tmp_path / "t.jsonl", Reading()).utterances][:3] == ["a_b", "a_b~2", "e"]


def test_twenty_thousand_files_of_one_name_and_person_are_told_apart_at_once(tmp_path):
    names = [f"{number:05d}/audio.wav" for number in range(20_000)]
    (tmp_path / "list.txt").write_text("".join(f"ann {name}\n" for name in [*names, "x/audio~3.wav"]))
    found = merged([read_corpus(tmp_path / "list.txt", Reading())])
    assert len({utterance.listed for utterance in found}) == 20_001
    assert [found[number].name for number in (0, 1, 19_999)] == ["audio.wav", "audio~2.wav", "audio~20000.wav"]


def test_shards_of_webdataset_hold_people_and_are_none(tmp_path, capsys):
    for shard in range(5):
        with tarfile.open(tmp_path / f"shards_{shard:09}.tar", "w") as tar:
            for i in range(5):
                (tmp_path / "spk").write_text(f"p{i}")
                tar.add(sound(tmp_path / "x.wav", 5 * shard + i), key := f"p{i}/mon/{shard}.wav")
                tar.add(tmp_path / "spk", key.replace(".wav", ".spk"))
    (tmp_path / "x.wav").unlink()
    words = [str(tmp_path), "--out", str(tmp_path.parent / "out_of_shards")]
    assert run(prepare_data.main, words) == 0
    assert f"{tmp_path}: tar files of WebDataset: 25 recordings, 5 people" in capsys.readouterr().out
    rows = (tmp_path.parent / "out_of_shards" / "train_list.txt").read_text().splitlines()
    assert len(rows) == 15 and all(row.split()[1].startswith(row.split()[0] + "/mon/") for row in rows)
    assert read_corpus(tmp_path / "shards_000000000.tar", Reading()).utterances[0].session == "mon"
