"""Noise and impulse responses: packed once, cut as from their own files, and what is said if they cannot be packed."""

import contextlib
import io
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from augmentation.waveforms import convolve, energy
from corpus import sound_pack
from corpus.audio import AudioError, read_crop
from corpus.augmentation import AugmentWAV, apply_draws
from corpus.progress import FileProgress
from corpus.sound_pack import UNCACHED, compact
from corpus.sounds import Decoded
from training.agreement import LOCAL_KEYS

RATE = 16000


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Folder of noise of several kinds of files, and impulse responses."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for category in ("noise", "speech", "music"):
        (folder / "musan" / category).mkdir(parents=True)
        for number, (ending, rate, kind) in enumerate(
            [("wav", RATE, "PCM_16"), ("flac", RATE, "PCM_24"), ("wav", 44100, "PCM_16"), ("mp3", RATE, None)]
        ):
            x = rng.normal(0, 0.1, int(1.2 * rate))
            soundfile.write(folder / "musan" / category / f"{number}.{ending}", x, rate, subtype=kind)
    (folder / "musan" / "speech" / "bad.wav").write_text("no audio")
    (folder / "rir").mkdir()
    for number, length in enumerate((200, 5000, 30000)):
        x = rng.normal(0, 0.1, length) * np.exp(-np.arange(length) / 2000)
        soundfile.write(folder / "rir" / f"{number}.wav", x, RATE, subtype="FLOAT")
    return folder


def augmenter(sounds, cache):
    return AugmentWAV(str(sounds / "musan"), str(sounds / "rir"), 1.0, str(cache))


def test_crops_from_packs_and_files_have_the_same_bits_and_their_draws_give_them_again(sounds, tmp_path):
    packed, plain = augmenter(sounds, tmp_path), augmenter(sounds, UNCACHED)
    assert packed.sounds.recordings.pack and packed.sounds.rirs.pack and plain.sounds.recordings.pack is None
    kinds = set()
    for seed in range(60):
        x = np.random.default_rng(seed).normal(0, 0.1, 8000).astype(np.float32)
        one, draws, unusable = packed.augment(x, np.random.default_rng(seed))
        other, others, same = plain.augment(x, np.random.default_rng(seed))
        assert np.array_equal(one, other) and one.dtype == np.float32 and (draws, unusable) == (others, same)
        assert np.array_equal(apply_draws(x, draws), one)
        kinds |= {draw["kind"] for draw in draws} | {kind for kind, _, _ in unusable}
    assert kinds == {"reverb", "noise", "speech", "music", "augmentation"}


def test_a_pack_is_made_once_and_again_when_a_file_changes_or_the_pack_is_cut(sounds, tmp_path, capsys):
    augmenter(sounds, tmp_path)
    said = capsys.readouterr().out
    assert "13 recordings of" in said and "1 of them cannot be read" in said and str(tmp_path) in said
    augmenter(sounds, tmp_path)
    assert capsys.readouterr().out == ""
    soundfile.write(sounds / "rir" / "0.wav", np.r_[1.0, np.zeros(50)], RATE)
    augmenter(sounds, tmp_path)
    assert "3 recordings of" in capsys.readouterr().out
    packs = list(tmp_path.glob("*.pack"))
    assert len(packs) == 2
    rir = next(path for path in packs if path.name.startswith("rir"))
    rir.write_bytes(rir.read_bytes()[:-9])
    assert augmenter(sounds, tmp_path).sounds.rirs.pack is not None
    said = capsys.readouterr().out
    assert f"{rir}: it is not whole; it is made again" in said and "packed into" in said


def test_a_log_has_a_line_a_minute_that_counts_no_more_files_than_there_are(monkeypatch):
    lines, clock = [], itertools.count(0, 40)
    monkeypatch.setattr("corpus.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with FileProgress(200, "packing noise", before=80, log=lines.append) as progress:
        for files in (64, 20, 20, 16):
            progress.update(files)
    assert lines == [
        "  packing noise: 164 of 200 files, about 1 min left",
        "  packing noise: 200 of 200 files, about 0 min left",
    ]


def test_a_folder_that_cannot_be_written_is_said_and_the_files_are_read(sounds, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    found = augmenter(sounds, tmp_path / "file" / "cache")
    assert found.sounds.recordings.pack is None and found.augment(np.ones(4000, np.float32), np.random.default_rng(0))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("augment_cache: no pack in" in line and "file by file" in line for line in said)


def test_samples_are_kept_in_16_bits_only_if_these_have_the_same_bits():
    x = (np.arange(-32768, 32768) / 32768).astype(np.float32)
    assert compact(x).dtype == np.int16 and np.array_equal(compact(x).astype(np.float32) / 32768, x)
    for odd in ([1.0], [1e-6], [np.nan], [np.inf], [-0.0]):
        kept = compact(np.array(odd, np.float32))
        assert kept.dtype == np.float32 and np.array_equal(kept, np.float32(odd), equal_nan=True)


def test_decoded_recordings_are_kept_up_to_a_number_of_samples(tmp_path, monkeypatch):
    read, places = [], [str(tmp_path / f"{number}.wav") for number in range(3)]
    for place in places:
        soundfile.write(place, np.zeros(44100), 44100)
    monkeypatch.setattr("corpus.sounds.read_crop", lambda path, **how: read.append(path) or read_crop(path, **how))
    decoded = Decoded(most=2 * RATE)
    for number in (0, 1, 0, 2, 0, 1, 1):
        assert len(decoded(places[number], "mix", RATE, ())) == RATE
    assert [places.index(path) for path in read] == [0, 1, 2, 1] and decoded.samples == 2 * RATE
    assert len(Decoded(most=RATE - 1)(places[0], "mix", RATE, ())) == RATE  # one that is longer than all


@pytest.mark.parametrize("samples", [1, 4095, 4096, 8192, 32240])
@pytest.mark.parametrize("length", [1, 300, 4096, 9000, 70000])
def test_convolution_is_that_of_the_definition(samples, length):
    rng = np.random.default_rng(samples + length)
    x, rir = rng.normal(0, 1, samples).astype(np.float32), rng.normal(0, 1, length).astype(np.float32)
    size = samples + length - 1
    expected = np.fft.irfft(np.fft.rfft(x, 2 * size) * np.fft.rfft(rir, 2 * size))[:samples]
    found = convolve(x, rir)
    assert found.shape == x.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() < 2e-6 * np.sqrt(energy(x) * energy(rir)) + 1e-6


def test_energy_of_a_waveform_beyond_the_range_of_its_squares():
    with np.errstate(over="ignore"):
        assert energy(np.full(10, 1e25, np.float32)) == pytest.approx(1e51)
    assert np.isnan(energy(np.array([1, np.nan], np.float32)))


def test_a_dead_impulse_response_is_named(sounds, tmp_path):
    (tmp_path / "rir").mkdir()
    soundfile.write(tmp_path / "rir" / "r.wav", np.zeros(100), RATE)
    for cache in (UNCACHED, tmp_path / "cache"):
        with pytest.raises(AudioError, match="without energy"):
            AugmentWAV("", str(tmp_path / "rir"), 1.0, str(cache)).sounds.rirs.response(0)


@pytest.fixture
def noises(tmp_path):
    """A folder of three noise files, and the call that packs it into a folder."""
    (tmp_path / "own" / "noise").mkdir(parents=True)
    for number in range(3):
        x = np.random.default_rng(number).normal(0, 0.1, 8000)
        soundfile.write(tmp_path / "own" / "noise" / f"{number}.wav", x, RATE)

    def pack(root=tmp_path / "own", cache=tmp_path / "cache"):
        return sound_pack.packed(str(root), sorted(map(str, Path(root, "noise").iterdir())), "mix", str(cache))

    return pack


def test_a_shared_cache_that_cannot_be_written_is_used(noises, monkeypatch, capsys):
    noises()

    @contextlib.contextmanager
    def refused(path):
        raise PermissionError(13, "Permission denied")
        yield

    monkeypatch.setattr(sound_pack, "folder_lock", refused)  # tests may run as root, whom no mode keeps out
    capsys.readouterr()
    assert noises() is not None and capsys.readouterr().out == ""


def test_a_root_that_is_relative_has_the_pack_of_the_absolute_one(noises, monkeypatch, tmp_path, capsys):
    first = noises().path
    capsys.readouterr()
    for folder, root in ((tmp_path, "own"), (tmp_path / "own", "."), (tmp_path / "cache", "../own")):
        monkeypatch.chdir(folder)
        assert noises(root).path == first
    assert capsys.readouterr().out == ""


def test_what_a_killed_packing_left_is_removed(noises, tmp_path):
    noises()
    (pack,) = (tmp_path / "cache").glob("*.pack")
    left, other = pack.with_suffix(".1.tmp"), pack.with_name("other-1-2.1.tmp")
    left.write_text("half")
    other.write_text("of another folder")
    pack.unlink()
    noises()
    assert not left.exists() and other.exists() and pack.exists()


def test_a_file_that_could_not_be_read_once_is_tried_at_the_next_start(noises, monkeypatch, capsys):
    read = sound_pack.read_crop

    def failing(path, **keys):
        if path.endswith("1.wav"):
            raise AudioError("Input/output error")
        return read(path, **keys)

    monkeypatch.setattr(sound_pack, "read_crop", failing)
    assert noises().reasons == {1: "Input/output error"}
    assert "1 of them cannot be read" in capsys.readouterr().out
    assert noises().reasons == {1: "Input/output error"} and capsys.readouterr().out == ""
    monkeypatch.undo()
    found = noises()
    assert found.reasons == {} and len(found.stored(1)) == 8000
    assert "1.wav can be read now; it is made again" in capsys.readouterr().out


def test_every_process_says_that_it_has_no_pack(noises, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for rank, start in (("0", "augment_cache: no pack"), ("3", "rank 3 on ")):
        monkeypatch.setenv("RANK", rank)
        assert noises(cache=tmp_path / "file" / "cache") is None
        assert capsys.readouterr().out.startswith(start)


def test_processes_may_have_their_packs_in_folders_of_their_own():
    assert "augment_cache" in LOCAL_KEYS


def test_a_process_that_is_spawned_reads_the_files_where_another_run_has_made_the_pack_again(sounds, tmp_path, capsys):
    found = augmenter(sounds, tmp_path)
    sent = pickle.dumps(found)
    Path(found.sounds.recordings.pack.path).unlink()
    again = pickle.loads(sent)
    assert again.sounds.recordings.pack is None and "made again by another run?" in capsys.readouterr().out
    for seed in range(5):
        x = np.random.default_rng(seed).normal(0, 0.1, 4000).astype(np.float32)
        one, other = (each.augment(x, np.random.default_rng(seed)) for each in (found, again))
        assert np.array_equal(one[0], other[0]) and one[1] == other[1]


def test_too_little_room_for_a_pack_is_said_in_units_that_show_it(noises, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 30_000}))
    assert noises() is None
    assert ": it would take 48 kB, 30 kB are free; " in capsys.readouterr().out
