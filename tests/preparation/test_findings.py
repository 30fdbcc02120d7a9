"""Bad files are named by kind and no others; a command that is killed goes on; the page shows it all."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import soundfile
from programs import ROOT, Program

import prepare_data
from corpus.locks import folder_lock
from corpus.speech import FRAME, Energy, Silero, extent, speech_frames
from preparation.conversion import write_part
from preparation.findings import KINDS, listen
from preparation.journal import Journal
from settings.command_line import run

PEOPLE = ("Anna Müller", "Борис", "cy", "dora")
SEED = np.random.default_rng(7)


def noise(seconds=0.6, level=0.1):
    return (level * SEED.standard_normal(int(16000 * seconds))).clip(-0.99, 0.99).astype(np.float32)


def write(path, x, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, x, 16000, subtype=subtype)
    return path


def spoil(folder) -> dict[str, str]:
    """Files of 14 kinds of faults {path: kind}."""
    x, bad = noise(), {}

    def place(kind, name):
        bad[name] = kind
        return folder / name

    place("missing", "cy/missing.wav").symlink_to("/nowhere/x.wav")
    place("empty", "cy/empty.flac").write_bytes(b"")
    place("not audio", "cy/page.wav").write_text("<html>404</html>" * 99)
    cut = write(place("truncated", "cy/cut.wav"), x)
    cut.write_bytes(cut.read_bytes()[:9000])
    wrong = write(place("wrong header", "cy/wrong.wav"), x)
    wrong.write_bytes(wrong.read_bytes()[:24] + (7).to_bytes(4, "little") + wrong.read_bytes()[28:])
    damaged = write(place("damaged", "cy/damaged.flac"), noise(3))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:20000] + bytes(range(256)) * 20 + content[20000 + 256 * 20 :])
    write(place("nonfinite", "dora/nan.wav"), np.where(np.arange(len(x)) == 777, np.nan, x), "FLOAT")
    write(place("too loud", "dora/loud.wav"), 32768 * x, "FLOAT")
    write(place("silent", "dora/silent.flac"), 0 * x)
    write(place("constant", "dora/offset.wav"), 0 * x + 0.25)
    write(place("channels cancel", "dora/phase.wav"), np.stack([x, -x], 1))
    write(place("clipped", "dora/clipped.wav"), (99 * x).clip(-1, 1))
    write(place("short", "dora/short.wav"), x[:4000])
    twice = (32768 * noise()).astype(np.int16)
    write(place("two speakers", "dora/twice.wav"), twice)
    write(place("two speakers", "cy/twice.flac"), twice)
    write(folder / "dora" / "again.wav", twice[::-1])
    write(place("duplicate", "dora/once again.flac"), twice[::-1])
    place("name", "dora/line\nbreak.wav").write_bytes((folder / "dora" / "again.wav").read_bytes())
    return bad


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """(folder of four people with sound and bad files, {bad file: kind})."""
    folder = tmp_path_factory.mktemp("recordings") / "people"
    for name in PEOPLE:
        for i in range(6):
            write(folder / name / f"mon {i % 2}" / f"{i} ü.wav", noise())
    return folder, spoil(folder) if os.name != "nt" else {}


def prepare(*words):
    return run(prepare_data.main, [str(word) for word in words])


def test_bad_files_are_named_by_kind_and_no_others(people, tmp_path, capsys):
    folder, expected = people
    assert prepare(folder, "--out", tmp_path / "set", "--seed", "2") == 0
    lines = (tmp_path / "set" / "bad_files.txt").read_text(encoding="utf-8").splitlines()
    found = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    assert found == {name.replace("\n", "\\n"): kind for name, kind in expected.items()}
    said = capsys.readouterr().out
    assert f"{len(expected)} of {len(expected) + 25} files left out" in said
    for kind in set(expected.values()):
        assert f"{kind}: {KINDS[kind]}" in said
    page = (tmp_path / "set" / "set.html").read_text(encoding="utf-8")
    assert "25 recordings of 4 people" in page and "Anna Müller" in page and "://" not in page
    assert all(f"<code>{name}</code>" in page for name in expected if "\n" not in name)


def test_a_command_that_is_killed_goes_on_and_ends_the_same(people, tmp_path):
    folder, _ = people
    words = [folder, "--out", "set", "--workers", "1"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = Program(ROOT / "prepare_data.py", *words, cwd=tmp_path / "whole").wait()
    assert whole.returncode == 0, whole.stderr
    journal = tmp_path / "killed" / "set" / ".prepared" / "files.jsonl"
    for wanted in (5, 15):
        program = Program(ROOT / "prepare_data.py", *words, cwd=tmp_path / "killed")
        while program.returncode is None and (not journal.exists() or journal.read_bytes().count(b"\n") < wanted):
            time.sleep(0.001)
        program.send_signal(signal.SIGKILL)
        program.process.join()
        with open(journal, "ab") as file:
            file.write(b'["half a line')
    before = journal.read_bytes()
    again = Program(ROOT / "prepare_data.py", *words, cwd=tmp_path / "killed").wait()
    assert again.returncode == 0 and again.stdout == whole.stdout
    for name in ("train_list.txt", "trials.txt", "config.yaml", "bad_files.txt", "set.html"):
        one, other = (tmp_path / of / "set" / name for of in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name
    keys = [json.loads(line)[0] for line in journal.read_bytes().splitlines()[1:]]
    assert len(keys) == len(set(keys)) and journal.read_bytes().startswith(before[: before.rindex(b"\n")])


def test_a_file_that_changed_is_read_again_and_an_old_journal_is_put_aside(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.add("a", [1, float("nan")])
    journal.close()
    assert Journal(tmp_path / "j").get("a")[0] == 1
    (tmp_path / "j").write_bytes(b'{"format_version": 0}\n["a", 1]\n')
    assert Journal(tmp_path / "j").get("a") is None


def test_two_commands_do_not_write_into_one_folder(people, tmp_path, capsys):
    (tmp_path / "set" / ".prepared").mkdir(parents=True)
    with folder_lock(tmp_path / "set" / ".prepared" / "lock"):
        assert prepare(people[0], "--out", tmp_path / "set") == 2
    assert "another prepare_data.py writes into" in capsys.readouterr().err
    assert prepare(people[0], "--out", people[0] / "set") == 2
    assert "lies inside of" in capsys.readouterr().err


def test_lengths_and_speech_are_limits(people, tmp_path):
    folder = tmp_path / "people"
    for name in PEOPLE:
        for i in range(3):
            write(folder / name / f"{i}.wav", noise(0.4 + 0.4 * i))
    write(folder / "cy" / "pause.wav", np.concatenate([0.001 * noise(), noise(0.2), 0.001 * noise()]))
    words = ("--min_seconds", "0.7", "--max_seconds", "1.5", "--min_speech", "0.5")
    assert prepare(folder, "--out", tmp_path / "set", *words) == 0
    kinds = [line.split("\t")[1] for line in (tmp_path / "set" / "bad_files.txt").read_text().splitlines()]
    assert sorted(kinds) == ["little speech"] + ["short"] * 4


def test_speech_is_found_trimmed_and_written_without_a_change(tmp_path):
    quiet, loud = 1e-3 * noise(0.5), noise(1.0)
    x = np.concatenate([quiet, loud, quiet[:3200], loud, quiet])
    path = write(tmp_path / "x.wav", x)
    sound = listen(str(path))
    assert sound.speech == pytest.approx(2.2, abs=0.05)  # the pause of 0.2 s belongs to it
    assert (sound.begin, sound.end) == pytest.approx((0.4, 2.8), abs=0.03)
    levels = Energy()
    for block in np.array_split(x[:, None], 7):
        levels.add(16000, block)
    frames = x[: len(x) // 320 * 320].reshape(-1, 320)
    assert levels.levels() == pytest.approx(10 * np.log10((frames**2).mean(1)), abs=1e-3)
    late = Energy()  # of 11,025 Hz: a frame is 220 samples, not 220.5
    late.add(11025, np.concatenate([1e-3 * noise(60.0)[: 60 * 11025], noise(10.0)[: 10 * 11025]])[:, None])
    assert late.spans()[0] == pytest.approx((60.0, 70.0), abs=0.03)
    assert not speech_frames(np.full(9, -100.0)).any() and extent([]) == (0, 0)
    assert speech_frames(np.full(9, -20.0)).all() and FRAME == 0.02
    cut = write_part(str(path), tmp_path / "cut", 0.5, 1.0)
    assert cut.suffix == ".flac"
    assert np.array_equal(soundfile.read(cut, dtype="int16")[0], soundfile.read(path, dtype="int16")[0][8000:24000])
    loud = write_part(str(write(tmp_path / "loud.wav", 3 * x, "FLOAT")), tmp_path / "whole")
    assert loud.suffix == ".wav" and np.abs(soundfile.read(loud)[0]).max() > 1  # nothing is clipped
    assert b"PEAK" not in loud.read_bytes()  # which holds the time


def test_silero_finds_speech_where_it_is_installed(tmp_path):
    pytest.importorskip("silero_vad")
    detector = Silero()
    for block in np.array_split(noise(2)[:, None], 3):
        detector.add(8000, block)
    assert all(0 <= begin < end <= 4 for begin, end in detector.spans())  # noise is not speech, or little of it
    assert listen(str(write(tmp_path / "x.wav", noise(2))), "silero").speech < 1


def test_trimmed_and_cut_recordings_make_a_set(tmp_path):
    kaldi = tmp_path / "kaldi"
    speech = [[noise(0.8) for _ in range(2)] for _ in PEOPLE]
    x = np.concatenate(
        [part for both in speech for one in both for part in (1e-4 * noise(0.6), one, 1e-4 * noise(0.6))]
    )
    write(kaldi / "all.wav", x)
    (kaldi / "wav.scp").write_text("all all.wav\n")
    (kaldi / "utt2spk").write_text("".join(f"{name[0]}{i} {name[0]}\n" for name in PEOPLE for i in range(2)), "utf-8")
    starts = [(f"{name[0]}{i}", 2.0 * (2 * n + i)) for n, name in enumerate(PEOPLE) for i in range(2)]
    (kaldi / "segments").write_text("".join(f"{key} all {at} {at + 2}\n" for key, at in starts), "utf-8")
    assert prepare(kaldi, "--out", tmp_path / "set", "--trim") == 0
    for (_, listed), both in zip(
        [line.split() for line in (tmp_path / "set" / "train_list.txt").read_text("utf-8").splitlines()], speech
    ):
        info = soundfile.info(tmp_path / "set" / "wav" / listed)
        assert info.frames == pytest.approx(16000 * (len(both[0]) / 16000 + 0.2), abs=700)
    shutil.rmtree(kaldi)  # the set has files of its own
    assert len(list((tmp_path / "set" / "wav").rglob("*_trimmed.flac"))) == 8


def test_what_is_too_short_once_it_is_trimmed_is_left_out(tmp_path):
    for i in range(12):
        parts = noise(0.001 if i % 2 else 0.6, 1e-4), noise(0.3 if i == 0 else 1.2), noise(0.6, 1e-4)
        write(tmp_path / "people" / f"p{i % 4}" / f"{i}.wav", np.concatenate(parts))
    words = (tmp_path / "people", "--out", tmp_path / "set", "--min_seconds", "1", "--max_seconds", "1.75")
    assert prepare(*words, "--trim") == 0
    kind, said = (tmp_path / "set" / "bad_files.txt").read_text().split("\t")[1:]
    assert kind == "short" and said.endswith(" of 1.50 s once it is trimmed\n")
    shutil.rmtree(tmp_path / "set")
    assert prepare(*words) == 2  # without it half of them are too long
