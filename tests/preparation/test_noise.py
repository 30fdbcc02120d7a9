"""MUSAN in pieces and impulse responses reach the configuration."""

import numpy as np
import soundfile
import yaml

import prepare_data
from preparation.conversion import cut_noise
from settings.command_line import run


def write(path, seconds, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    soundfile.write(path, x, 16000)


def test_noise_is_cut_and_both_go_into_the_configuration(tmp_path):
    for name in ("music/fma/a.wav", "noise/free-sound/b.wav", "speech/librivox/c.wav"):
        write(tmp_path / "musan" / name, 33, len(name))
    write(tmp_path / "RIRS_NOISES" / "simulated_rirs" / "smallroom" / "Room001" / "r.wav", 0.3)
    for i in range(12):
        write(tmp_path / "people" / f"p{i // 3}" / f"{i}.wav", 1, i)
    words = [str(tmp_path / name) for name in ("people", "musan", "RIRS_NOISES")]
    assert run(prepare_data.main, [*words, "--out", str(tmp_path / "set")]) == 0
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert config["augment"] is True and config["rir_path"] == str(tmp_path / "RIRS_NOISES" / "simulated_rirs")
    pieces = sorted((tmp_path / "set" / "noise" / "musan_split" / "music" / "fma" / "a").iterdir())
    assert config["musan_path"] == str(pieces[0].parents[3])
    assert [p.name for p in pieces] == [f"{s:05}.flac" for s in (0, 5, 10, 15, 20, 25, 30)]
    joined = np.concatenate([soundfile.read(p, dtype="int16")[0] for p in pieces])
    whole = soundfile.read(tmp_path / "musan" / "music" / "fma" / "a.wav", dtype="int16")[0]
    assert np.array_equal(joined, whole[: len(joined)]) and len(joined) == 33 * 16000
    assert cut_noise(str(pieces[0].parents[3]), tmp_path, None, 1) == pieces[0].parents[3]  # in pieces already
