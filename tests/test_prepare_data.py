"""From a folder of people to lists and a configuration that trains."""

import shlex
import shutil

import numpy as np
import pytest
import scipy
import soundfile
import yaml

import prepare_data
from corpus.lists import read_train_list, read_trials
from errors import ROOT, shell_path
from preparation.outputs import write_config
from settings.command_line import run
from training.start import configure

NAMES = ("Anna Müller", "Борис", "carl", "dora", "Émile 2", "frida")


@pytest.fixture
def people(data, tmp_path):
    """A folder of six people whose names are not those of a corpus, a cut file, and one of opposite channels."""
    folder = tmp_path / "my people"
    for name, source in zip(NAMES, sorted((data / "wav").glob("train*"))):
        shutil.copytree(source, folder / name)
    first, second = sorted((folder / "carl").rglob("*.flac"))[:2]
    first.write_bytes(first.read_bytes()[:3000])
    second.rename(second.with_name("with a space.flac"))
    third = next((folder / "dora").rglob("*.flac"))
    x, rate = soundfile.read(third)
    soundfile.write(third, np.stack([x, -x], axis=1), rate)
    return folder


def prepare(*words):
    return run(prepare_data.main, [str(word) for word in words])


def test_a_folder_of_people_becomes_lists_and_a_configuration(people, tmp_path, capsys):
    out = tmp_path / "mine"
    assert prepare(people, "--out", out, "--share", "0.34") == 0
    said = capsys.readouterr().out
    assert "2 of 30 files left out" in said and [path.split("/")[0] for path in prepare_left(out)] == ["carl", "dora"]
    speakers, _, paths, _ = read_train_list(out / "train_list.txt")
    labels, first, second = read_trials(out / "trials.txt")
    tested = {path.split("/")[0] for path in first + second}
    assert len(tested) == 2 and tested.isdisjoint(speakers) and tested | set(speakers) == set(NAMES)
    everything = {path.relative_to(people).as_posix() for path in people.rglob("*.flac")}
    assert set(paths) | set(first) | set(second) == everything - set(prepare_left(out))
    same = [a.split("/")[0] == b.split("/")[0] for a, b in zip(first, second)]
    assert same == [bool(label) for label in labels] and 2 * labels.sum() == len(labels)
    assert len(set(zip(first, second))) == len(labels) and all(a != b for a, b in zip(first, second))
    config, *_ = configure(["--config", str(out / "config.yaml")])  # lists and folders are checked here
    assert config.train_path == str(people) and config.model == "ECAPA_TDNN" and config.lr == 0.002
    assert f"python trainSpeakerNet.py --config '{out / 'config.yaml'}'" in said or str(out / "config.yaml") in said


def test_printed_commands_take_paths_that_begin_with_a_minus(people, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare(people, "--out", "./-x") == 0
    words = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "--config" in line]
    assert words and words[0][words[0].index("--config") + 1] == "./-x/config.yaml"
    assert shell_path("-a b") == "'./-a b'" and shell_path("a-b") == "a-b"


def prepare_left(out) -> list[str]:
    return [line.split("\t")[0] for line in (out / "bad_files.txt").read_text(encoding="utf-8").splitlines()]


def test_what_was_prepared_trains(people, tmp_path, tools):
    assert prepare(people, "--out", tmp_path / "mine") == 0
    tiny = {"channels": 8, "aggregate": 16, "n_mels": 24, "nOut": 12, "max_frames": 40, "batch_size": 4, "max_epoch": 1}
    tiny |= {"nDataLoaderThread": 0, "threads": 1, "device": "cpu", "mixedprec": False, "spec_augment": "[0,0]"}
    words = [f"--{key}={value}" for key, value in {**tiny, "save_path": tmp_path / "run"}.items()]
    done = tools.command("--config", tmp_path / "mine" / "config.yaml", *words)
    assert done.returncode == 0 and "EER" in done.stdout, done.stdout + done.stderr


def write_m4a(path, x, rate: int):
    """Write a waveform as AAC in an m4a file."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="ipod") as file:
        stream = file.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(x[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)


def test_m4a_files_become_flac_and_train(data, tmp_path, tools):
    pytest.importorskip("av")
    folder, sources = tmp_path / "m4a", {}
    for person in sorted((data / "wav").glob("train*")):
        for source in sorted(person.rglob("*.flac"))[:3]:
            x, rate = soundfile.read(source)
            place = folder / person.name / f"{source.stem}.m4a"
            write_m4a(place, x, rate)
            sources[f"{person.name}/{source.stem}"] = x
    broken = folder / "train000" / "broken.m4a"
    broken.write_bytes(next(folder.rglob("*.m4a")).read_bytes()[:900])
    out = tmp_path / "out"
    assert prepare(folder, "--out", out) == 0
    assert list(prepare_left(out)) == ["train000/broken.m4a"]
    paths = read_train_list(out / "train_list.txt")[2]
    _, first, second = read_trials(out / "trials.txt")
    assert {str(path).removesuffix(".flac") for path in (*paths, *first, *second)} == set(sources)
    for name, x in sources.items():
        y, rate = soundfile.read(out / "wav" / f"{name}.flac")
        assert (
            rate == 16000
            and abs(len(y) - len(x)) <= 2 * 1024
            and soundfile.info(out / "wav" / f"{name}.flac").subtype == "PCM_16"
        )
        lags = scipy.signal.correlate(y, x, method="fft")
        assert lags.max() / np.sqrt(np.sum(x**2) * np.sum(y**2)) > 0.9
    before = {path: path.stat().st_mtime_ns for path in (out / "wav").rglob("*.flac")}
    assert prepare(folder, "--out", out) == 0  # and nothing is converted again
    assert before == {path: path.stat().st_mtime_ns for path in (out / "wav").rglob("*.flac")}
    tiny = {"channels": 8, "aggregate": 16, "n_mels": 24, "nOut": 12, "max_frames": 40, "batch_size": 4, "max_epoch": 1}
    tiny |= {"nDataLoaderThread": 0, "threads": 1, "device": "cpu", "mixedprec": False, "spec_augment": "[0,0]"}
    words = [f"--{key}={value}" for key, value in {**tiny, "save_path": tmp_path / "run"}.items()]
    done = tools.command("--config", out / "config.yaml", *words)
    assert done.returncode == 0 and "EER" in done.stdout, done.stdout + done.stderr


def test_the_same_seed_gives_the_same_lists(people, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(people, "--out", tmp_path / name, "--seed", seed)
    lists = [[(tmp_path / n / f).read_bytes() for f in ("train_list.txt", "trials.txt")] for n in "abc"]
    assert lists[0] == lists[1] != lists[2]


def test_what_cannot_be_prepared_is_one_line(people, tmp_path, capsys):
    def refused(*words):
        assert prepare(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "none").mkdir()
    assert "no recording below" in refused(tmp_path / "none", "--out", tmp_path / "x")
    assert "no such folder" in refused(tmp_path / "nowhere", "--out", tmp_path / "x")
    assert "--share must lie" in refused(people, "--out", tmp_path / "x", "--share", "1")
    lacking = f"--musan: no recording in a folder 'noise' below '{tmp_path / 'none'}'"
    assert refused(people, "--out", tmp_path / "x", "--musan", tmp_path / "none") == lacking
    lacking = f"--rirs: no recording below '{tmp_path / 'none'}'"
    assert refused(people, "--out", tmp_path / "x", "--rirs", tmp_path / "none") == lacking
    shutil.copy(next(people.rglob("*.flac")), people / "loose.flac")
    assert "lies in no person's folder; wanted: " in refused(people, "--out", tmp_path / "x")
    (people / "loose.flac").unlink()
    for name in NAMES[2:]:
        shutil.rmtree(people / name)
    assert "2 people with usable recordings" in refused(people, "--out", tmp_path / "x")
    assert not (tmp_path / "x" / "train_list.txt").exists()


def test_where_a_missing_file_was_looked_for_is_said(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("ann ann/1.wav\nbob bob/1.wav\n")
    assert prepare(tmp_path / "list.txt", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"       2 missing: is not there, or may not be read, as {tmp_path / 'ann' / '1.wav'}"


def test_corpora_without_anybody_are_told_from_noise_alone(tmp_path, capsys):
    for name in ("voices/clips", "musan/noise", "musan/music", "musan/speech"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "voices" / "validated.tsv").write_text("client_id\tpath\n")
    assert prepare(tmp_path / "voices", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == "prepare_data.py: no recording of a person in what was given\n"
    assert prepare(tmp_path / "voices", tmp_path / "musan", "--out", tmp_path / "out") == 2
    assert "only noise, and no recordings of people" in capsys.readouterr().err


def test_the_configuration_is_the_small_one_with_other_places(tmp_path):
    base = ROOT / "configs" / "small_speech.yaml"
    write_config(tmp_path / "c.yaml", base, {"train_list": r"C:\lists\1: a #.txt", "save_path": "exps/é"})
    before, after = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (base, tmp_path / "c.yaml"))
    assert after == {**before, "train_list": r"C:\lists\1: a #.txt", "save_path": "exps/é"}
