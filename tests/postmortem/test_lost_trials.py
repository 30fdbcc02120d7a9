"""Trials without a score are traced to the files that cost them, or to the network."""

import json
import math
import os
from pathlib import Path

import numpy as np
import soundfile
from programs import analyser

from postmortem.evaluation_faults import candidates


def test_lost_scores_are_traced_to_the_fewest_files(settings, tools, data, tmp_path, write):
    names = sorted({p for line in (data / "trials.txt").read_text().splitlines() for p in line.split()[1:]})
    wav = tmp_path / "wav"
    for name in names:
        (wav / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(data / "wav" / name, wav / name)
    bad = names[3]
    audio, rate = soundfile.read(wav / bad)
    (wav / bad).unlink()
    audio[77] = math.nan
    trials = tmp_path / "trials.txt"
    trials.write_text((data / "trials.txt").read_text().replace(bad, "bad.wav"))
    soundfile.write(wav / "bad.wav", audio, rate, subtype="FLOAT")
    keys = {"test_path": str(wav), "test_list": str(trials), "max_nan_score_pct": 90.0}
    assert tools.command("--config", write({**settings, **keys})).returncode == 0
    done = analyser(settings["save_path"], "--json")
    (found,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and found["cause"] == "evaluation"
    assert found["location"]["files"] == [{"path": str(wav / "bad.wav"), "sample": 77}]
    assert "1 file with bad audio accounts for all of them" in analyser(settings["save_path"]).stdout
    (lost,) = (Path(settings["save_path"]) / "result").glob("nan_trials_epoch_*.txt")
    page = tmp_path / "page.html"
    assert analyser(lost, "--html", page).returncode == 0 and "bad.wav" in page.read_text()
    # The same scores lost with sound files: the network is at fault, and nothing is said to be a fix.
    soundfile.write(wav / "bad.wav", np.nan_to_num(audio), rate, subtype="FLOAT")
    (found,) = [json.loads(line) for line in analyser(lost, "--json").stdout.splitlines()]
    assert found["detail"] == "nonfinite_embedding"
    assert [fix["verdict"] for fix in found["recommendations"]] == ["untested"]


def test_lost_scores_of_a_list_that_does_not_decide_are_traced_in_its_own_folder(
    settings, tools, data, tmp_path, write
):
    names = sorted({p for line in (data / "trials.txt").read_text().splitlines() for p in line.split()[1:]})
    (tmp_path / "wav8").mkdir()
    for name in names:  # another list of the same trials, as flat files of 8 kHz
        audio, rate = soundfile.read(data / "wav" / name)
        audio = audio[::2].copy()
        audio[55] = math.nan if name == names[3] else audio[55]
        soundfile.write(tmp_path / "wav8" / f"{names.index(name)}.wav", audio, rate // 2, subtype="FLOAT")
    lines = [line.split() for line in (data / "trials.txt").read_text().splitlines()]
    text = "".join(f"{label} {names.index(a)}.wav {names.index(b)}.wav\n" for label, a, b in lines)
    (tmp_path / "other.txt").write_text(text)
    lists = {
        "O": str(data / "trials.txt"),
        "E_2": {"list": str(tmp_path / "other.txt"), "root": str(tmp_path / "wav8")},
    }
    assert tools.command("--config", write({**settings, "test_list": lists, "max_nan_score_pct": 90.0})).returncode == 0
    (found,) = [json.loads(line) for line in analyser(settings["save_path"], "--json").stdout.splitlines()]
    assert found["location"]["files"] == [{"path": str(tmp_path / "wav8" / "3.wav"), "sample": 55}]
    assert any("metrics.jsonl" in text for text in found["evidence"]) and "nan_trials_E_2_epoch_" in found["file"]


def test_a_lost_pair_alone_blames_both_files_until_one_is_shown_bad():
    pairs = [("b.wav", "a.wav")]
    assert sorted(candidates(pairs)) == ["a.wav", "b.wav"]
    assert candidates([("a.wav", "b.wav"), ("c.wav", "a.wav")]) == ["a.wav"]
