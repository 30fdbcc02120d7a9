"""How a recording sounds, and the warning for one that is unlike what a calibration was learnt on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.signal
import soundfile

import verify
from corpus.acoustics import Acoustics, listen_to
from corpus.audio import AudioError
from errors import UsageError
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration
from scoring.cautions import beyond
from scoring.mismatch import Heard
from settings.command_line import run
from speaker_model import load_model
from storage.files import save_atomically

RATE = 16000


def bursts(seconds=3.0, gap_db=30.0, seed=0):
    """Noise that is loud for 0.3 s and ``gap_db`` lower for 0.2 s, in turns."""
    x = 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    quiet = np.arange(len(x)) % (RATE // 2) > 0.3 * RATE
    return np.where(quiet, x * 10 ** (-gap_db / 20), x).astype(np.float32)


def test_measures_of_known_sounds():
    sound = Acoustics.of(bursts())
    assert sound.seconds == 3 and sound.level == pytest.approx(-20, abs=3) and sound.bandwidth == 8000
    assert sound.snr == pytest.approx(30, abs=1.5)
    assert Acoustics.of(bursts(gap_db=10)).snr == pytest.approx(10, abs=1.5)
    low = scipy.signal.sosfilt(scipy.signal.butter(12, 3400, fs=RATE, output="sos"), bursts()).astype(np.float32)
    assert 3400 < Acoustics.of(low).bandwidth < 5600
    assert Acoustics.of(bursts() / 100).level == pytest.approx(sound.level - 40, abs=0.1)
    assert Acoustics.of(bursts(), RATE, 8000, "MP3", 1.5).to_dict() == {
        **sound.to_dict(),
        "seconds": 1.5,
        "speech": min(sound.speech, 1.5),
        "rate": 8000,
        "codec": "MP3",
    }
    assert Acoustics.of(bursts(), RATE, 44100).rate == RATE and np.isfinite(Acoustics.of(np.zeros(9)).snr)


def test_files_tell_their_rate_and_codec(tmp_path):
    for name, rate, subtype, codec in (
        ("a.flac", 48000, "PCM_16", "lossless"),
        ("a.wav", 16000, "PCM_16", "lossless"),
        ("f.wav", 16000, "FLOAT", "lossless"),
        ("u.wav", 8000, "ULAW", "ULAW"),
        ("v.ogg", 16000, "VORBIS", "VORBIS"),
    ):
        soundfile.write(tmp_path / name, bursts(), rate, subtype=subtype)
        sound = listen_to(tmp_path / name)
        assert (sound.rate, sound.codec) == (min(rate, RATE), codec)
    soundfile.write(tmp_path / "n.wav", np.full(9000, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN"):
        listen_to(tmp_path / "n.wav")


def test_what_lies_outside_is_named_with_the_range():
    sound = Acoustics.of(bursts())
    heard = Heard.of([replace(sound, seconds=s) for s in np.linspace(2, 5, 50)])
    assert not heard.unlike(sound) and not heard.unlike(replace(sound, seconds=1.5, snr=90.0))
    other = replace(sound, seconds=0.9, level=-70.0, snr=3.0, bandwidth=3800.0, rate=8000.0, codec="MP3")
    assert heard.unlike(other) == [
        "length 0.9 s (2.15 to 4.85 s)",
        f"level -70 dB ({sound.level:.3g} dB)",
        f"SNR 3 dB ({sound.snr:.3g} dB)",
        "bandwidth 3.8 kHz (8 kHz)",
        "rate 8 kHz (16 kHz)",
        "codec MP3 (lossless)",
    ]
    tone = replace(sound, snr=0.0)
    assert not Heard.of([tone]).unlike(tone) and not Heard.of([tone]).unlike(sound)
    again = Heard.from_dict(json.loads(json.dumps(heard.to_dict())))
    assert again.unlike(other) == heard.unlike(other) and again.files == 50


def test_a_back_end_with_damaged_ranges_is_refused(tmp_path):
    backend = Backend(calibration=LogisticCalibration([20.0], -10.0), heard=Heard.of([Acoustics.of(bursts())]))
    backend.save(tmp_path / "b.json")
    assert Backend.load(tmp_path / "b.json").heard == backend.heard
    text = (tmp_path / "b.json").read_text()
    (tmp_path / "b.json").write_text(text.replace('"level": [', '"level": ["x", '))
    with pytest.raises(UsageError, match="damaged"):
        Backend.load(tmp_path / "b.json")


def test_a_recording_unlike_those_of_the_calibration_is_said_in_a_line(data, settings, tools, tmp_path, capsys):
    path = tmp_path / "model_best.model"
    save_atomically(tools.build(settings).state.capture(), path)
    files = sorted((data / "wav").rglob("*.flac"))
    backend = Backend(calibration=LogisticCalibration([20.0], -10.0), identity=load_model(path).identity)
    backend.heard = Heard.in_files(map(str, files))
    assert backend.heard.files == len(files)
    backend.save(path.with_suffix(".calibration"))
    x, _ = soundfile.read(files[0], dtype="float32")
    noise = np.random.default_rng(0).standard_normal(len(x)).astype(np.float32) * 4 * x.std()
    changed = {"faint": (0.01 * x, "level"), "noisy": (x + noise, "SNR"), "short": (x[4000:10000], "length")}
    changed["narrow"] = scipy.signal.sosfilt(scipy.signal.butter(12, 3000, fs=RATE, output="sos"), x), "bandwidth"

    def complaint(file):
        assert run(verify.main, [str(files[1]), str(file), "--initial_model", str(path)]) == 0
        return capsys.readouterr().err

    assert complaint(files[2]) == ""
    for name, (y, measure) in changed.items():
        soundfile.write(tmp_path / f"{name}.wav", y, RATE, subtype="FLOAT")
        said = complaint(tmp_path / f"{name}.wav")
        assert said.count("\n") == 1 and said.startswith(f"warning: {tmp_path / name}.wav: unlike what the calibration")
        assert f"{measure} " in said and said.endswith("its probability may be wrong\n")


def test_qmf_beyond_the_measures_that_it_was_learnt_on_is_told():
    rng = np.random.default_rng(0)
    names, learnt = ("score", "log_duration_min", "system 1"), rng.uniform(0, 1, (200, 3))
    assert beyond(names, learnt, rng.uniform(0.1, 0.9, (100, 3))) == []
    trials = rng.uniform(0.1, 0.9, (100, 3)) - np.where(np.arange(100) < 20, 1, 0)[:, None]
    (said,) = beyond(names, learnt, trials)
    assert said.startswith("20 % of the trials have a log_duration_min beyond its 0.0")
