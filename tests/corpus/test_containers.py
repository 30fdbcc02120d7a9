"""Recordings of every container: whole ones are read whole, cut ones refused, nothing is read shorter in silence."""

import io
import shutil
import struct
import subprocess
import threading

import numpy as np
import pytest
import soundfile
from recordings import read_audio

from corpus.audio import AudioError, audio_length, read_blocks, read_crop
from corpus.containers import examine
from corpus.decode import Recording

RATE = 16000
CONTAINERS = {  # name: (libsndfile's format, subtype, largest error of a sample)
    "wav": ("WAV", "PCM_16", 1e-4),
    "wav24": ("WAV", "PCM_24", 1e-6),
    "wavfloat": ("WAV", "FLOAT", 1e-7),
    "wavulaw": ("WAV", "ULAW", 0.05),
    "wavex": ("WAVEX", "PCM_16", 1e-4),
    "rf64": ("RF64", "PCM_16", 1e-4),
    "w64": ("W64", "PCM_16", 1e-4),
    "aiff": ("AIFF", "PCM_16", 1e-4),
    "au": ("AU", "PCM_16", 1e-4),
    "caf": ("CAF", "PCM_16", 1e-4),
    "sph": ("NIST", "PCM_16", 1e-4),
    "flac": ("FLAC", "PCM_16", 1e-4),
    "ogg": ("OGG", "VORBIS", 0.2),
    "mp3": ("MP3", "MPEG_LAYER_III", 0.3),
}


@pytest.fixture
def speech():
    """Two seconds that change all the time, so that a shift or a hole would show."""
    rng = np.random.default_rng(0)
    noise = np.convolve(rng.normal(0, 0.1, 2 * RATE), np.ones(8) / 8, "same")
    return (noise * (1.2 + np.sin(np.arange(2 * RATE) / 2000))).astype(np.float32)


def written(path, x, name):
    """Write samples as a container of the table."""
    container, subtype, _ = CONTAINERS[name]
    soundfile.write(path, x, RATE, format=container, subtype=subtype)
    return path


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_whole_recording_is_read_whole_and_in_place(name, speech, tmp_path):
    path = written(tmp_path / "a", speech, name)
    x, start, rate, channels = read_audio(path)
    assert (start, rate, channels) == (0, RATE, 1) and audio_length(path) == len(x) >= len(speech)
    assert np.abs(x[: len(speech)] - speech).max() < CONTAINERS[name][2]
    crop, start, *_ = read_audio(path, 4000, start=9000)
    assert start == 9000 and np.abs(crop - x[9000:13000]).max() < 1e-3
    assert sum(len(block) for _, block in read_blocks(path)) == len(x)
    assert not Recording(path).notes


@pytest.mark.parametrize("name", CONTAINERS)
def test_half_a_recording_is_refused_in_every_container(name, speech, tmp_path):
    path = written(tmp_path / "a", speech, name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=r"truncated|damaged"):
        read_audio(path)
    with pytest.raises(AudioError, match=r"truncated|damaged"):
        list(read_blocks(path))


@pytest.mark.parametrize("name", CONTAINERS)
def test_nothing_and_next_to_nothing(name, tmp_path):
    path = tmp_path / "a"
    path.touch()
    with pytest.raises(AudioError, match="empty file"):
        read_audio(path)
    written(path, np.full(1, 0.25, np.float32), name)
    try:
        assert 1 <= len(read_audio(path)[0]) <= 4000  # encoders fill up a frame
    except AudioError as error:
        assert "no samples" in str(error) or "truncated" in str(error)


@pytest.mark.parametrize("samples", [1, 4096, 4097, 32000, 100_000])
def test_digital_silence_is_read_whole(samples, tmp_path):
    for name in ("flac", "wav", "ogg"):
        path = written(tmp_path / name, np.zeros(samples, np.float32), name)
        assert audio_length(path) == len(read_audio(path)[0]) == samples and not read_audio(path)[0].any()


@pytest.mark.parametrize("name", [n for n in CONTAINERS if n not in ("mp3", "ogg")])
def test_channels_in_opposite_phase_are_said_and_one_can_be_taken(name, speech, tmp_path):
    path = written(tmp_path / "a", np.stack([speech, -speech], axis=1), name)
    mixed = read_crop(path)
    assert np.abs(mixed.x).max() < 0.05 and [kind for kind, _ in mixed.notes] == ["channels cancel"]
    second = read_crop(path, channel="2")
    assert np.abs(second.x + speech).max() < CONTAINERS[name][2] and not second.notes
    assert read_crop(path, channel="loudest").channel in ("1", "2")
    with pytest.raises(AudioError, match="has 1 channel, not channel 2"):
        read_crop(written(tmp_path / "b", speech, name), channel="2")


def test_a_flac_written_to_a_pipe_is_read_whole(speech, tmp_path):
    path = written(tmp_path / "a.flac", speech, "flac")
    content = bytearray(path.read_bytes())
    for total in (0, 2**36 - 1):  # not known, and more than the file can hold
        content[18 + 3 : 18 + 8] = (content[21] & 0xF0 | total >> 32).to_bytes(1, "big") + struct.pack(
            ">I", total & 0xFFFFFFFF
        )
        path.write_bytes(content)
        x = read_audio(path)[0]
        assert np.abs(x - speech).max() < 1e-4 and audio_length(path) == len(speech)
        crop, start, *_ = read_audio(path, 4000, position=0.999)
        assert start > 2 * RATE - 4100 and np.abs(crop - speech[start : start + 4000]).max() < 1e-4
        assert Recording(path).notes[0][0] == "repaired"


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_xing_header_is_read_to_its_end(mode, speech, tmp_path):
    quiet = np.concatenate([np.zeros(RATE, np.float32), speech, speech])  # its first frames say little of the others
    buffer = io.BytesIO()
    soundfile.write(buffer, quiet, RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    content, path = buffer.getvalue(), tmp_path / "a.mp3"
    place = max(content.find(b"Xing"), content.find(b"Info"))
    assert place > 0
    path.write_bytes(content[:place] + b"\0\0\0\0" + content[place + 4 :])
    x = read_audio(path)[0]
    assert len(quiet) <= len(x) < len(quiet) + 5000 and audio_length(path) == len(x)
    assert np.abs(x[-RATE:]).max() > 0.05


def test_a_telephone_recording_that_cannot_be_sought_is_cropped(speech, tmp_path):
    path = tmp_path / "gsm.wav"
    soundfile.write(path, speech, RATE, subtype="GSM610")
    whole = read_audio(path)[0]
    crop, start, *_ = read_audio(path, 4000, start=9000)
    assert start == 9000 and np.array_equal(crop, whole[9000:13000])


@pytest.mark.parametrize("name", ["caf", "w64", "rf64", "wav", "aiff"])
@pytest.mark.parametrize("promise", ["half", "placeholder"])
def test_a_size_of_samples_that_is_wrong_is_made_good(name, promise, speech, tmp_path):
    path = written(tmp_path / "a", speech, name)
    content = bytearray(path.read_bytes())
    half = written(tmp_path / "half", speech[:RATE], name).read_bytes()
    start = len(content) - 2 * len(speech)  # of the samples, in a container without anything behind them
    if promise == "half":
        content[start - 24 : start] = half[start - 24 : start]  # the words before the samples, their size among them
    else:
        back, width = {"caf": (12, 8), "w64": (8, 8), "aiff": (12, 4)}.get(name, (4, 4))
        content[start - back : start - back + width] = b"\xff" * width
    path.write_bytes(content)
    x = read_audio(path)[0]
    assert len(x) == len(speech) and np.abs(x - speech).max() < 1e-4


def test_a_wav_whose_header_is_a_pipes_placeholder_is_read_whole(speech, tmp_path):
    path = written(tmp_path / "a.wav", speech, "wav")
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert np.abs(read_audio(path)[0] - speech).max() < 1e-4


def test_a_rotten_ogg_is_refused(speech, tmp_path):
    path = written(tmp_path / "a.ogg", np.tile(speech, 4), "ogg")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(AudioError, match="damaged"):
        read_audio(path)


def test_what_libsndfile_does_not_know_is_converted_or_says_how(speech, tmp_path, monkeypatch):
    program, path = shutil.which("ffmpeg"), tmp_path / "a.m4a"
    if program is None:
        path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    else:
        source = written(tmp_path / "a.wav", speech, "wav")
        subprocess.run([program, "-loglevel", "error", "-i", source, "-c:a", "aac", path], check=True)
        x = read_crop(path)
        assert abs(len(x.x) - len(speech)) < 4000 and x.notes[0][0] == "converted"
    monkeypatch.setattr("corpus.converters.shutil.which", lambda name: None)
    monkeypatch.setattr("corpus.converters.importlib.util.find_spec", lambda name: None)
    with pytest.raises(AudioError, match=r"ffmpeg -i a\.m4a -ar 16000 -ac 1 a\.wav"):
        read_audio(path)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
def test_no_program_is_left_behind_by_a_file_that_is_only_looked_at(speech, tmp_path, monkeypatch):
    source, path, started = written(tmp_path / "a.wav", np.tile(speech, 40), "wav"), tmp_path / "a.m4a", []
    subprocess.run(["ffmpeg", "-loglevel", "error", "-i", source, "-c:a", "aac", path], check=True)
    start = subprocess.Popen
    monkeypatch.setattr("corpus.converters.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(
        "corpus.converters.subprocess.Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1]
    )
    before = threading.active_count()
    with Recording(path):
        assert started[0].poll() is None
    assert started[0].poll() is not None and threading.active_count() == before


def test_messages_of_the_mp3_decoder_are_one_line_a_file(speech, tmp_path, capfd):
    path = written(tmp_path / "a.mp3", np.tile(speech, 3), "mp3")
    content = bytearray(path.read_bytes())
    for place in range(4000, len(content) - 400, 1500):
        content[place + 40 : place + 60] = b"\x5a" * 20
    path.write_bytes(content)
    try:
        notes = read_crop(path).notes
    except AudioError:
        notes = []
    assert "mpg123" not in capfd.readouterr().err
    assert sum(kind == "decoder warnings" for kind, _ in notes) <= 1


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_plain_wav_file_is_read_without_libsndfile_and_has_its_bits(tmp_path, channels):
    x = np.random.default_rng(0).integers(-32768, 32768, (5000, channels)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", x, 16000)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(data[:12] + b"LIST\x03\x00\x00\x00abc\x00" + data[12:] + b"LIST\x02\x00\x00\x00ab")
    for name in ("a.wav", "b.wav"):
        expected = soundfile.read(tmp_path / name, dtype="float32", always_2d=True)[0]
        with Recording(tmp_path / name) as recording:
            assert recording.found.plain and (recording.frames, recording.channels) == (5000, channels)
            assert np.array_equal(recording.read(0, 5000), expected)
            assert np.array_equal(recording.read(1234, 77), expected[1234:1311])
            assert np.array_equal(np.concatenate(list(recording.blocks(999))), expected)
    soundfile.write(tmp_path / "c.wav", x, 16000, subtype="PCM_24")
    assert Recording(tmp_path / "c.wav").found.plain is None


@pytest.mark.parametrize(
    "odd",
    [
        lambda form, data: b"RIFF\0\0\0\0AVI " + form + data,
        lambda form, data: b"RIFF\0\0\0\0WAVE" + form + form + data,
        lambda form, data: b"RIFF\0\0\0\0WAVE" + form + data + data,
        lambda form, data: b"RIFF\0\0\0\0WAVE" + fmt_chunk(1025) + data,
    ],
)
def test_a_wav_file_that_libsndfile_may_refuse_is_left_to_it(tmp_path, odd):
    data = b"data" + struct.pack("<I", 41000) + bytes(range(250)) * 164
    (tmp_path / "a.wav").write_bytes(b"RIFF\0\0\0\0WAVE" + fmt_chunk(1) + data)
    assert examine(tmp_path / "a.wav").plain
    (tmp_path / "a.wav").write_bytes(odd(fmt_chunk(1), data))
    assert examine(tmp_path / "a.wav").plain is None


def fmt_chunk(channels):
    return b"fmt " + struct.pack("<IHHIIHH", 16, 1, channels, RATE, 2 * channels * RATE, 2 * channels, 16)
