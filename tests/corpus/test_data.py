"""Reading audio, augmentation, the sampler and the loader."""

import collections

import numpy as np
import pytest
import soundfile
import torch
from recordings import read_audio

from config import Config
from corpus.audio import AudioError, audio_length, samples_of
from corpus.augmentation import AugmentWAV, find_noise
from corpus.lists import read_train_list, read_trials
from corpus.loader import make_loader
from DatasetLoader import SpeakerBatchSampler, TestDataset, TrainDataset, collate
from errors import UsageError
from scoring.files import read_scores, write_scores, write_trials
from settings.reader import load_config

RATE = 16000


def tone(seconds=1.0, rate=RATE, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


def test_crop_is_what_a_full_read_and_a_slice_give(tmp_path):
    x = np.random.default_rng(0).normal(0, 0.1, RATE)
    for suffix, subtype in (("wav", "PCM_16"), ("flac", "PCM_16"), ("wav", "FLOAT")):
        path = tmp_path / f"x.{suffix}"
        soundfile.write(path, x, RATE, subtype=subtype)
        whole, *_ = read_audio(path)
        for position in (0.0, 0.37, 0.999999):
            crop, start, rate, channels = read_audio(path, 4000, position)
            assert (len(crop), crop.dtype, rate, channels) == (4000, np.float32, RATE, 1)
            assert np.array_equal(crop, whole[start : start + 4000])


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus", "mp3"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    kind = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(path, tone(), RATE, **kind)
    whole, *_ = read_audio(path)
    assert abs(len(whole) - RATE) < 2500 and audio_length(path) == len(whole)
    spectrum = np.abs(np.fft.rfft(whole))
    assert np.argmax(spectrum) * RATE / len(whole) == pytest.approx(440, abs=2)
    crop, start, *_ = read_audio(path, 3000, 0.7)
    assert np.abs(crop - whole[start : start + 3000]).max() < 1e-6  # mp3 needs the frames before the crop


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(rate=rate), rate, subtype="FLOAT")
    whole, _, found, _ = read_audio(path)
    assert found == rate and len(whole) == RATE == audio_length(path)
    assert np.abs(whole - tone())[500:-500].max() < 5e-3
    crop, start, *_ = read_audio(path, 3000, 0.4)
    reference = 0.5 * np.sin(2 * np.pi * 440 * (start / rate + np.arange(3000) / RATE))
    assert np.abs(crop - reference)[300:-300].max() < 5e-3


def test_stereo_is_mixed_down(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, np.stack([tone(), 0 * tone()], 1), RATE, subtype="FLOAT")
    mono, _, _, channels = read_audio(path)
    assert channels == 2 and np.allclose(mono, tone() / 2, atol=1e-6)


def test_short_files_are_repeated(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(0.1), RATE, subtype="FLOAT")
    crop, *_ = read_audio(path, 4000, 0.5)
    assert np.allclose(crop, np.resize(tone(0.1), 4000), atol=1e-6)


def test_speed_changes_pitch(tmp_path):
    from fractions import Fraction

    path = tmp_path / "x.wav"
    soundfile.write(path, tone(), RATE, subtype="FLOAT")
    for speed in (Fraction(9, 10), Fraction(11, 10)):
        crop, *_ = read_audio(path, 8000, 0.2, speed)
        assert np.argmax(np.abs(np.fft.rfft(crop))) * 2 == pytest.approx(440 * float(speed), abs=4)


def test_bad_files_are_named(tmp_path):
    empty, text, cut = tmp_path / "empty.wav", tmp_path / "text.wav", tmp_path / "cut.flac"
    soundfile.write(empty, np.zeros(0), RATE)
    text.write_text("not audio")
    soundfile.write(cut, np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    cut.write_bytes(cut.read_bytes()[:9000])
    for path in (empty, text, cut, tmp_path / "missing.wav"):
        with pytest.raises(AudioError):
            read_audio(path)


# ------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    "reader, text, message",
    [
        (read_trials, "1 a b\n0 a c\n1 a\n", ":3: expected 'label pathA pathB', got 2 columns"),
        (read_trials, "1 a b\nyes a c\n", ":2: the label must be 0, 1, nontarget or target, got 'yes'"),
        (read_trials, "1 a b\n", "all 1 trials have label 1"),
        (read_trials, "", "empty"),
        (read_train_list, "s a\ns\n", ":2: expected 'speaker path'"),
        (read_train_list, "\n", "empty"),
        (
            read_train_list,
            "Anna Mueller/Neue Aufnahme.wav\n",
            "got 3 columns; if names hold spaces, put tabs between",
        ),
        (
            read_train_list,
            "a/1.wav anna\nb/2.flac bert\n",
            ":1: the columns are swapped, write 'speaker path', as 'anna a",
        ),
        (
            read_trials,
            "a b 1\n",
            ":1: the columns are 'pathA pathB label'; the trainer reads the label first: awk '{print $3",
        ),
    ],
)
def test_list_errors_have_line_numbers(tmp_path, reader, text, message):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=None) as caught:
        reader(path)
    assert message in str(caught.value) and str(caught.value).startswith(str(path))


def test_lists_may_come_from_windows(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbftarget a b\r\nnontarget a c\r\n")
    labels, first, second = read_trials(path)
    assert labels.tolist() == [1, 0] and first == ["a", "a"] and second == ["b", "c"]


def test_names_with_spaces_stand_between_tabs_and_are_scored_under_the_same_names(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("Anna Mueller\tAnna Mueller/Neue Aufnahme.wav\nBert\tb.wav\t\nid3 c.wav \n")
    speakers, _, paths, _ = read_train_list(path)
    assert speakers == ["Anna Mueller", "Bert", "id3"] and paths[0] == "Anna Mueller/Neue Aufnahme.wav"
    names = ["Anna Mueller/Neue Aufnahme.wav", "b.wav"], ["Anna Mueller/2.wav", "c d.wav"]
    write_trials(path, [1, 0], *names)
    labels, *read = read_trials(path)
    assert labels.tolist() == [1, 0] and read == list(names)
    write_scores(path, [0.25, -1.0], [1, 0], *names)
    scored = read_scores(path)
    assert (scored.first, scored.second, scored.scores.tolist()) == (*names, [0.25, -1.0])
    path.write_text("0.5 1 a.wav b.wav\n0.5\t1\ta b.wav\tc.wav\n")  # line by line
    assert read_scores(path).first == ["a.wav", "a b.wav"]


# ------------------------------------------------------------------------------------------------ augmentation


@pytest.fixture
def noises(tmp_path):
    rng = np.random.default_rng(0)
    for category in ("noise", "speech", "music"):
        for depth in ("", "deeper/"):  # musan and musan_split
            folder = tmp_path / "musan" / category / "source" / depth
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(4):
                soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, RATE), RATE)
    (tmp_path / "rir").mkdir()
    soundfile.write(tmp_path / "rir" / "r.wav", np.r_[1.0, np.zeros(99), 0.5], RATE, subtype="FLOAT")
    return tmp_path


def test_noise_is_found_at_both_depths(noises):
    assert {k: len(v) for k, v in find_noise(noises / "musan").items()} == {"noise": 8, "speech": 8, "music": 8}


def test_signal_to_noise_ratio_is_what_was_drawn(noises):
    augment = AugmentWAV(str(noises / "musan"), "", 1.0)
    ranges = {"noise": (0, 15, 1, 1), "speech": (13, 20, 3, 7), "music": (5, 15, 1, 1)}
    seen = collections.Counter()
    x = tone().astype(np.float32)
    for seed in range(60):
        mixed, draws, bad = augment.augment(x, np.random.default_rng(seed))
        low, high, fewest, most = ranges[draws[0]["kind"]]
        assert fewest <= len(draws) <= most and not bad and all(low <= d["snr_db"] <= high for d in draws)
        noise = float(np.mean((mixed - x) ** 2))
        expected = sum(float(np.mean(x**2)) / 10 ** (d["snr_db"] / 10) for d in draws)
        assert noise == pytest.approx(expected, rel=0.1)
        seen[draws[0]["kind"]] += 1
    assert min(seen[k] for k in ranges) > 8


def test_silent_noise_and_dead_impulse_responses_do_no_harm(noises):
    x = tone().astype(np.float32)
    for path in (noises / "musan").rglob("*.wav"):
        soundfile.write(path, np.zeros(RATE), RATE)
    mixed, draws, _ = AugmentWAV(str(noises / "musan"), "", 1.0).augment(x, np.random.default_rng(0))
    assert np.array_equal(mixed, x) and draws[0]["reason"] == "silent"
    silent, draws, _ = AugmentWAV(str(noises / "musan"), "", 1.0).augment(0 * x, np.random.default_rng(0))
    assert np.array_equal(silent, 0 * x)
    for number, dead in enumerate((np.zeros(100), np.r_[1.0, np.nan])):
        folder = noises / f"dead{number}"
        folder.mkdir()
        soundfile.write(folder / "r.wav", dead, RATE, subtype="FLOAT")
        mixed, draws, bad = AugmentWAV("", str(folder), 1.0).augment(x, np.random.default_rng(0))
        assert np.array_equal(mixed, x) and draws[0]["reason"] and bad[0][1].endswith("r.wav")


def test_reverberation_is_a_convolution(noises):
    x = tone().astype(np.float32)
    mixed, draws, _ = AugmentWAV("", str(noises / "rir"), 1.0).augment(x, np.random.default_rng(0))
    expected = (x + 0.5 * np.r_[np.zeros(100), x[:-100]]) / np.sqrt(1.25)
    assert draws[0]["kind"] == "reverb" and np.allclose(mixed, expected, atol=1e-4)


def test_a_category_without_files_is_an_error(noises):
    for path in (noises / "musan" / "music").rglob("*.wav"):
        path.unlink()
    with pytest.raises(UsageError, match="musan_path: no recording in a folder 'music'"):
        AugmentWAV(str(noises / "musan"), "", 1.0)
    with pytest.raises(UsageError, match="needs musan_path or rir_path"):
        AugmentWAV("", "", 1.0)


# ----------------------------------------------------------------------------------------------------- sampler


class Corpus:
    """Stands for a TrainDataset: speakers with given numbers of utterances."""

    def __init__(self, counts):
        self.speakers = [f"s{i}" for i in range(len(counts))]
        self.edges = np.cumsum([0, *counts])
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def utterances_of(self, speaker):
        return np.arange(self.edges[speaker], self.edges[speaker + 1])


def make_sampler(counts, batch_size, per_row=1, distinct=False, max_seg=500, rank=0, world=1, sampling="count"):
    keys = {"seed": 1, "nPerSpeaker": per_row, "max_seg_per_spk": max_seg, "batch_size": batch_size}
    config = Config(**keys, sampling=sampling)
    return SpeakerBatchSampler(Corpus(counts), config, distinct, rank, world)


@pytest.mark.parametrize("counts", [[10] * 20, [3, 7, 1, 12, 9, 4, 4, 20], list(range(1, 30))])
@pytest.mark.parametrize("batch_size", [2, 7, 16, 64])
def test_no_utterance_is_dropped_and_speakers_stand_apart(counts, batch_size):
    sampler = make_sampler(counts, batch_size)
    plan = sampler.plan(1)
    assert sorted(u for batch in plan for row in batch for u, _ in row) == list(range(sum(counts)))
    sizes = [len(batch) for batch in plan]
    assert (
        min(sizes) >= 2
        and max(sizes) <= max(batch_size, 3)
        and max(sizes) - min(sizes) <= 1
        and len(plan) == len(sampler)
    )
    most = -(-max(counts) // len(plan))  # 1 where it is possible at all
    for batch in plan:
        speakers = collections.Counter(sampler.dataset.labels[row[0][0]] for row in batch)
        assert max(speakers.values()) <= most
    assert plan != sampler.plan(2) and plan == sampler.plan(1)


def test_rows_hold_utterances_of_one_speaker():
    sampler = make_sampler([5, 2, 9, 1, 4, 4], batch_size=3, per_row=3, distinct=True)
    seen = set()
    for batch in sampler.plan(1):
        assert len({sampler.dataset.labels[row[0][0]] for row in batch}) == len(batch)
        for row in batch:
            assert len(row) == 3 and len({sampler.dataset.labels[u] for u, _ in row}) == 1
            assert len(set(row)) == 3  # the same utterance twice is another crop
            seen |= {u for u, _ in row}
    assert len(seen) == 25


def test_surplus_rows_of_a_comparing_loss_wait():
    sampler = make_sampler([40, 2, 2, 2], batch_size=4, per_row=2, distinct=True)
    assert sampler.surplus > 0
    assert all(len({sampler.dataset.labels[r[0][0]] for r in b}) == len(b) for b in sampler.plan(1))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("counts", [[200, 2, 2, 2], [200, 10, 10, 10, 10, 10]])
def test_no_process_is_left_with_a_single_row(counts, world):
    for rank in range(world):
        sampler = make_sampler(counts, batch_size=4, per_row=2, distinct=True, rank=rank, world=world)
        assert min(len(batch) for batch in sampler) >= 2


def test_max_seg_per_spk_limits_an_epoch_and_changes_with_it():
    sampler = make_sampler([50] * 4, batch_size=4, max_seg=6)
    first, second = ({u for b in sampler.plan(e) for r in b for u, _ in r} for e in (1, 2))
    assert len(first) == 24 and first != second


@pytest.mark.parametrize("counts", [[6] * 11, [3, 7, 1, 12, 9, 4, 4, 20], [30] * 5])
@pytest.mark.parametrize("worlds", [(2, 1, 3), (1, 3, 2), (4, 1, 1, 2)])
def test_each_row_of_an_epoch_comes_once_under_changing_numbers_of_processes(counts, worlds):
    trained, dealt, whole = [], [], make_sampler(counts, 4, world=worlds[0]).plan(3)
    for turn, world in enumerate(worlds):
        samplers = [make_sampler(counts, 4, rank=rank, world=world) for rank in range(world)]
        left = len(samplers[0].plan(3, dealt))
        done = left if turn + 1 == len(worlds) else min(turn + 2, left)
        first = len(samplers[0]) - left
        for sampler in samplers:
            sampler.set_position(3, first, dealt)
        for batch, parts in zip(range(done), zip(*samplers)):
            sizes = [len(part) for part in parts]
            assert min(sizes) >= 2 and max(sizes) <= 5 and max(sizes) - min(sizes) <= 1, batch
            trained += [row for part in parts for epoch, row in part]
        dealt = [*dealt, (left, done)]
    waiting = samplers[0].plan(3, dealt[:-1]).left_out
    assert len(trained) == len(set(trained)) == whole.size - waiting and waiting < 2 * max(worlds)


def test_an_epoch_that_is_dealt_again_keeps_the_speakers_of_a_comparing_loss_apart():
    sampler = make_sampler([12] * 9, 3, per_row=2, distinct=True, world=1)
    of = len(make_sampler([12] * 9, 3, per_row=2, distinct=True, world=2))
    for done in range(1, of):
        plan = sampler.plan(1, [(of, done)])
        labels = sampler.dataset.labels
        assert all(len({labels[row[0][0]] for row in batch}) == len(batch) for batch in plan)
        assert plan.left_out == 0 and plan == sampler.plan(1, [(of, done)])


def test_ranks_share_a_batch_without_overlap():
    whole = make_sampler([6] * 10, 8).plan(1)
    parts = [list(make_sampler([6] * 10, 4, rank=r, world=2)) for r in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for batch, a, b in zip(whole, *parts):
        assert sorted(batch) == sorted(row for _, row in a + b)


@pytest.mark.parametrize("per_row", [1, 2])
def test_speakers_with_more_rows_than_a_round_has_left_stand_apart_too(per_row):
    counts = np.random.default_rng(5).integers(1, 40, 60).tolist() + [80] * 3
    sampler = make_sampler(counts, batch_size=13, per_row=per_row)
    for epoch in range(1, 6):
        plan = sampler.plan(epoch)
        sizes = {len(batch) for batch in plan}
        assert len(sizes) <= 2 and max(sizes) - min(sizes) <= 1
        for batch in plan:
            owners = collections.Counter(int(sampler.dataset.labels[row[0][0]]) for row in batch)
            assert all(times <= -(-counts[owner] // per_row // len(plan)) for owner, times in owners.items())


@pytest.mark.parametrize("per_row", [1, 2])
def test_a_list_in_any_order_gives_the_batches_of_a_sorted_one(per_row):
    sampler = make_sampler([3, 7, 1, 12, 9, 4, 30], batch_size=5, per_row=per_row)
    place = np.random.default_rng(2).permutation(66)
    mixed = Corpus([])
    mixed.labels = sampler.dataset.labels[place]
    other = SpeakerBatchSampler(mixed, Config(seed=1, nPerSpeaker=per_row, batch_size=5), False)
    number = np.argsort(mixed.labels, kind="stable")  # in the mixed list, of each utterance of the sorted one
    for dealt in ((), [(9, 3)]):
        renamed = [[tuple((number[u], copy) for u, copy in row) for row in batch] for batch in sampler.plan(2, dealt)]
        assert list(other.plan(2, dealt)) == renamed


@pytest.mark.parametrize("mixed", [False, True])
def test_the_utterances_of_a_speaker_are_those_of_its_lines(settings, data, tmp_path, mixed):
    lines = (data / "train_list.txt").read_text().splitlines()
    lines = lines[1::2] + lines[::2] if mixed else lines
    (tmp_path / "list.txt").write_text("\n".join(lines))
    dataset = TrainDataset(Config(train_list=str(tmp_path / "list.txt"), train_path=settings["train_path"]))
    assert (dataset.order is not None) == mixed
    for speaker, name in enumerate(dataset.speakers):
        own = [number for number, line in enumerate(lines) if line.split()[0] == name]
        assert dataset.utterances_of(speaker).tolist() == own


@pytest.mark.parametrize(("sampling", "power"), [("count", 1), ("sqrt", 0.5), ("uniform", 0)])
@pytest.mark.parametrize("distinct", [False, True])
def test_sampling_gives_each_speaker_its_share(sampling, power, distinct):
    counts = [4, 9, 25, 100, 64, 1]
    sampler = make_sampler(counts, batch_size=3, sampling=sampling, distinct=distinct, max_seg=90)
    rows = np.zeros(len(counts))
    for epoch in range(1, 41):
        plan = sampler.plan(epoch)
        drawn = [row[0] for batch in plan for row in batch]
        assert len(drawn) == sampler.rows == len(set(drawn))  # an utterance that comes again is another crop
        found = np.bincount(sampler.dataset.labels[[utterance for utterance, _ in drawn]], minlength=len(counts))
        rows += found
    capped = np.minimum(counts, 90.0)
    wanted = capped**power * (capped.sum() / (capped**power).sum())
    wanted = np.minimum(wanted, 90)
    wanted = np.minimum(wanted, len(plan)) if distinct else wanted
    assert np.allclose(rows / 40, wanted, atol=0.03 * wanted + 0.5)


# ------------------------------------------------------------------------------------------------------ loader


def make_dataset(settings, **more):
    config = load_config([f"--{k}={v}" for k, v in {**settings, **more}.items()])[0]
    dataset = TrainDataset(config)
    return dataset, SpeakerBatchSampler(dataset, config, config.nPerSpeaker > 1), config


def test_batches_do_not_depend_on_the_number_of_workers(settings, noises):
    keys = {"augment": True, "musan_path": noises / "musan", "rir_path": noises / "rir", "speed_perturb": True}
    dataset, sampler, config = make_dataset(settings, **keys)
    runs = []
    for workers in (0, 1, 2):
        sampler.set_position(2)
        runs.append(list(make_loader(dataset, sampler, collate, config, workers)))
    for one, other in ((runs[0], runs[1]), (runs[0], runs[2])):
        for a, b in zip(one, other):
            assert (
                torch.equal(a["data"], b["data"]) and torch.equal(a["label"], b["label"]) and a["files"] == b["files"]
            )
    sampler.set_position(2, 3)
    rest = list(make_loader(dataset, sampler, collate, config, 0))
    assert len(rest) == len(runs[0]) - 3 and torch.equal(rest[0]["data"], runs[0][3]["data"])
    kinds = {d["kind"] for batch in runs[0] for info in batch["files"] for d in info["augment"]}
    assert {"reverb", "noise"} <= kinds | {"noise"}


def test_a_batch_has_the_documented_shape_and_provenance(settings):
    dataset, sampler, config = make_dataset(settings, nPerSpeaker=2, trainfunc="angleproto", batch_size=3)
    batch = next(iter(make_loader(dataset, sampler, collate, config, 0)))
    rows = len(batch["label"])
    assert batch["data"].shape == (2, rows, samples_of(40)) and batch["data"].dtype is torch.float32
    assert len(batch["files"]) == 2 * rows
    for utterance in range(2):
        for row in range(rows):
            info = batch["files"][utterance * rows + row]
            assert dataset.speakers[batch["label"][row]] in info["path"]
            whole, *_ = read_audio(info["path"])
            part = whole[info["start"] : info["start"] + samples_of(40)]
            assert torch.equal(batch["data"][utterance, row, : len(part)], torch.from_numpy(part))


def test_speed_copies_are_new_speakers(settings):
    dataset, sampler, config = make_dataset(settings, speed_perturb=True)
    labels = torch.cat([b["label"] for e in range(1, 9) for b in _epoch(dataset, sampler, config, e)])
    assert dataset.classes == 18 and set(labels.tolist()) == set(range(18))


def _epoch(dataset, sampler, config, epoch):
    sampler.set_position(epoch)
    return list(make_loader(dataset, sampler, collate, config, 0))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_evaluation_plan_groups_equal_lengths(data, batch_size):
    _, first, second = read_trials(data / "trials.txt")
    files = sorted(set(first) | set(second))
    dataset = TestDataset(files, str(data / "wav"), 0, 10, batch_size)
    seen = []
    for i in range(len(dataset)):
        read, audio, problems = dataset[i]
        assert not problems and len(read) <= batch_size and audio.shape[1] == 1
        for index, row in zip(read, audio):
            whole, *_ = read_audio(data / "wav" / files[index])
            assert torch.equal(row[0], torch.from_numpy(whole))
        seen += read
    assert sorted(seen) == list(range(len(files)))


def test_evaluation_crops_are_evenly_spaced(data):
    _, first, _ = read_trials(data / "trials.txt")
    dataset = TestDataset([first[0]], str(data / "wav"), 30, 4, 8)
    _, audio, _ = dataset[0]
    whole, *_ = read_audio(data / "wav" / first[0])
    size = samples_of(30)
    starts = np.linspace(0, len(whole) - size, 4).astype(int)
    assert audio.shape == (1, 4, size)
    assert all(np.array_equal(audio[0, k].numpy(), whole[s : s + size]) for k, s in enumerate(starts))


def loadWAV(audio, max_frames, num_eval, draw=None):
    """voxceleb_trainer's: the crops of an evaluation, or with ``draw`` in [0, 1) the crop of training."""
    wanted = max_frames * 160 + 240
    if len(audio) <= wanted:
        audio = np.pad(audio, (0, wanted - len(audio) + 1), "wrap")
    starts = np.linspace(0, len(audio) - wanted, num=num_eval) if draw is None else [draw * (len(audio) - wanted)]
    return np.stack([audio[int(start) : int(start) + wanted] for start in starts])


@pytest.mark.parametrize("samples", [1000, 5039, 5040, 5041, 9000])
def test_crops_of_a_short_file_are_those_of_voxceleb_trainer(tmp_path, samples):
    audio = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    for crops in (1, 2, 10):
        _, found, _ = TestDataset(["a.wav"], str(tmp_path), 30, crops, 4)[0]
        assert np.array_equal(found[0].numpy(), loadWAV(audio, 30, crops)), crops
    if samples <= 5040:  # a longer one has a random crop
        for draw in (0.0, 0.5, 0.999):
            assert np.array_equal(read_audio(tmp_path / "a.wav", 5040, draw)[0], loadWAV(audio, 30, 1, draw)[0])
