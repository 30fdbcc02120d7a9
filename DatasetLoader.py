"""Lists -> crops -> augmentation -> batches. Every random draw comes from (seed, epoch, utterance)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from config import SAMPLE_RATE, Config
from corpus.audio import (
    SPEEDS,
    AudioError,
    audio_length,
    least_samples,
    read_crop,
    samples_of,
    wrap_pad,
)
from corpus.augmentation import AugmentWAV, first_at_fault
from corpus.crop import Crop, Provenance
from corpus.decode import reading
from corpus.generators import Generators
from corpus.parcels import empty
from corpus.sampling import SpeakerBatchSampler, by_speaker
from corpus.speech import joined, kept_spans, no_speech
from corpus.train_list import train_list_of
from corpus.waiting import LARGEST, packed

__all__ = ["SpeakerBatchSampler", "TestDataset", "TrainDataset", "collate", "collate_one"]

REPLACEMENT_TRIES = 20  # other utterances tried in place of one that cannot be used
NONFINITE = "NaN or Inf samples"


class TrainDataset(Dataset):
    """Rows of crops: item (epoch, ((utterance, copy), ...)) -> (audio (M, samples), label, provenance, events)."""

    def __init__(self, config: Config):
        self.list = train_list_of(config)  # arrays: forked workers would copy lists of objects page by page
        self.list.open_packs()
        self.speakers, self.labels, self.parts = self.list.speakers, self.list.labels, self.list.parts
        self.weights = [source.weight for source in self.list.sources]
        self.order = by_speaker(self.labels)
        self.starts = np.zeros(len(self.speakers) + 1, np.int32)
        np.cumsum(np.bincount(self.labels, minlength=len(self.speakers)), out=self.starts[1:], dtype=np.int32)
        self.sample_rate = config.sample_rate
        self.samples = samples_of(config.max_frames, self.sample_rate)
        self.generators, self.channel = Generators(config.seed), config.channel
        self.speeds = SPEEDS if config.speed_perturb else SPEEDS[:1]
        self.augmenter, self.waits = None, config.augment_on == "device"
        if config.augment:
            cache = config.augment_cache or str(Path(config.save_path).parent / "noise_cache")
            where = config.musan_path, config.rir_path
            self.augmenter = AugmentWAV(*where, config.augment_prob, cache, config.augmentation, self.sample_rate)

    def __len__(self):
        return len(self.list)

    @property
    def classes(self) -> int:
        """Number of classes: speakers, times the speeds that make new speakers of them."""
        return len(self.speakers) * len(self.speeds)

    def speakers_hash(self) -> str:
        """Hash of the speakers in label order: which speaker each class of a classifier is."""
        return self.list.speakers_hash()

    def utterances_of(self, speaker: int) -> np.ndarray:
        """Utterance numbers of a speaker."""
        first, last = self.starts[speaker], self.starts[speaker + 1]
        return np.arange(first, last, dtype=np.int32) if self.order is None else self.order[first:last]

    def path(self, utterance: int) -> str:
        """Path of an utterance as the list gives it."""
        return self.list.paths[utterance]

    def __getitem__(self, item):
        epoch, row = item
        first, copy = row[0]
        speed = 0
        if len(self.speeds) > 1:
            speed = int(self.generators.of(epoch, first, copy, Generators.SPEED).integers(len(self.speeds)))
        crops, provenance, events = [], [], []
        for utterance, copy in row:
            rng = self.generators.of(epoch, utterance, copy)
            with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are looked for
                crop, info = self._crop(int(utterance), self.speeds[speed], rng, events)
            crops.append(crop)
            provenance.append(info)
        label = int(self.labels[first]) + speed * len(self.speakers)
        x = np.stack(crops) if len(crops) > 1 else crops[0][None]
        return x, label, provenance, events

    def _crop(self, utterance, speed, rng, events):
        """Read and augment one crop; an unreadable file gives way to another of its speaker.

        If the crop holds NaN or Inf, its provenance has a ``spare``: (event that says what brings them, (crop,
        provenance, events) without them or None). That is another crop of the speaker, or, if it is the augmentation
        that brings them, the crop as it is.
        """
        candidates, replaced = self._candidates(utterance, rng), []
        found = self._first_usable(candidates, speed, rng, events, replaced)
        if found is None:  # silence of the right shape; the caller ends the run, for a whole speaker cannot be read
            events.append(("speaker", self.speakers[self.labels[utterance]], 0, "none of the files tried can be read"))
            last = replaced[-1]
            return np.zeros(self.samples, np.float32), Crop(
                last["path"], last["line"], sample_rate=self.sample_rate
            ).to_dict()
        crop, info = found
        if not np.isfinite(info["peak"]) and "spare" not in info:
            of_spare, event = [], ("nonfinite", info["path"], info["line"], NONFINITE)
            replaced.append({"path": info["path"], "line": info["line"], "reason": NONFINITE})
            spare = self._first_usable(candidates, speed, rng, of_spare, replaced, finite=True)
            info["spare"] = event, None if spare is None else (*spare, of_spare)
        return crop, info

    def _candidates(self, utterance, rng):
        """The utterance, then others of its speaker in an order at random."""
        yield utterance
        others = self.utterances_of(self.labels[utterance])
        yield from rng.permutation(others[others != utterance])[:REPLACEMENT_TRIES].tolist()

    def _first_usable(self, candidates, speed, rng, events, replaced, finite=False):
        """(crop, provenance) of the first candidate that can be read, and has no NaN or Inf if ``finite``; or None.

        Those that cannot be used are added to ``events`` and ``replaced``.
        """
        for utterance in candidates:
            path, line = self.list.file(utterance), self.list.lines[utterance]
            kind, reason = "nonfinite", NONFINITE
            try:
                position, opened = rng.random(), self.list.opened(utterance, path)
                rate = self.sample_rate
                read = read_crop(path, self.samples, position, speed, None, self.channel, opened, rate)
                usable = not finite or np.isfinite(read.x).all()
            except AudioError as error:
                kind, reason, usable = "unreadable", str(error), False
            if usable:
                break
            events.append((kind, path, line, reason))
            replaced.append({"path": path, "line": line, "reason": reason})
        else:
            return None
        if read.rate != self.sample_rate:
            events.append(("resampled", path, read.rate, ""))
        if read.channels > 1 and read.channel == "mix":
            events.append(("mixed down", path, read.channels, ""))
        events.extend((kind, path, 0, text) for kind, text in read.notes)
        crop = Crop(path, line, read.start, read.rate, float(speed), read.channel, utterance, replaced=list(replaced))
        crop.sample_rate = self.sample_rate
        if self.parts is not None:
            crop.list_path = self.list.place(utterance).rpartition(":")[0]
        if opened is not None:
            crop.pack, crop.pack_row, crop.pack_crc = opened.pack.folder, opened.row, opened.crc
        x, info = self._augmented(read.x, crop, rng, events, self.waits and not finite)
        if x is not read.x and not np.isfinite(info["peak"]) and np.isfinite(read.x).all():
            event = "augmentation", first_at_fault(read.x, crop.augment, self.sample_rate), 0, f"it gives {NONFINITE}"
            crop.augment = [{"reason": NONFINITE, **draw} for draw in crop.augment]
            clean = read.x, measured(read.x, crop)
            if not finite:
                info["spare"] = event, (*clean, [])
            else:
                events.append(event)
                x, info = clean
        return x, info

    def _augmented(self, x, crop: Crop, rng, events, waits: bool) -> tuple[np.ndarray, dict]:
        """Augment a crop x (samples,) -> (crop, provenance).

        If it ``waits``, what a device can do is left to it, and the provenance has it as ``waiting``. A row that is not
        finite, or might not be in the end, never waits.
        """
        if self.augmenter is None:
            return x, measured(x, crop)
        begun = self.augmenter.begun(x, rng, waits)
        crop.augment = begun.draws
        stages, growth = begun.operations()
        info = measured(begun.x, crop)
        if stages and info["peak"] * growth < LARGEST:
            info["waiting"] = stages
        elif stages:
            info = measured(begun.catch_up(), crop)
        events.extend((kind, file, 0, reason) for kind, file, reason in self.augmenter.sounds.unusable)
        return begun.x, info


def measured(x: np.ndarray, crop: Crop) -> dict:
    """The provenance of a row (samples,), with its peak."""
    crop.peak = max(float(x.max()), -float(x.min()))  # NaN if a sample is
    return crop.to_dict()


def collate(rows):
    """Sized rows -> {data (M, B, samples) float32, label (B,) int64, peak (M B,), files (M B dicts), spares, events}.

    ``files`` is a Provenance. ``spares`` {row: (event, (crop, provenance, events) or None)} is for rows with NaN or
    Inf. There may be a ``waiting``, what a device is to do to the rows: see ``corpus.waiting``.
    """
    data, labels, provenance, events = None, [], [], []
    for column, (crops, label, infos, of_row) in enumerate(rows):
        if data is None:
            data = empty((len(crops), len(rows), crops.shape[1]))
            into = data.numpy()
        into[:, column] = crops  # at once, while it is in the cache
        labels.append(label)
        provenance.append(infos)
        events += of_row
    files = [info for utterance in zip(*provenance) for info in utterance]
    spares = {row: info.pop("spare") for row, info in enumerate(files) if "spare" in info}
    waiting = packed({row: info.pop("waiting") for row, info in enumerate(files) if "waiting" in info}, into.shape[2])
    return {
        "data": data,
        "label": torch.tensor(labels, dtype=torch.int64),
        "peak": torch.tensor([info["peak"] for info in files]),
        "files": Provenance(files),
        "spares": {
            row: (event, spare and (torch.from_numpy(spare[0]), *spare[1:])) for row, (event, spare) in spares.items()
        },
        "events": events,
        **({} if waiting is None else {"waiting": waiting}),
    }


# ----------------------------------------------------------------------------------------------------- evaluation


def collate_one(items):
    """A loader item is a whole batch already."""
    (batch,) = items
    return batch


class Problems(dict):
    """{file number: reason} of unusable files; ``notes`` [(kind, file, text)] on files that are used all the same."""

    def __init__(self, *values):
        super().__init__(*values)
        self.notes = []


class TestDataset(Dataset):
    """Batches of whole files of equal length, or of ``num_eval`` evenly spaced crops a file.

    Item i is batch i of ``plan``, a list of file numbers: (file numbers, audio (files, crops, samples), problems). With
    ``vad`` a file is its speech alone, which all files are read for once more, at first.
    """

    __test__ = False

    def __init__(
        self,
        files: list[str],
        root: str,
        eval_frames: int,
        num_eval: int,
        batch_size: int,
        channel: str = "mix",
        sample_rate: int = SAMPLE_RATE,
        vad: str = "none",
    ):
        self.files, self.root, self.channel, self.sample_rate = files, root, channel, sample_rate
        self.vad, self.kept = vad, {}
        self.crop = samples_of(eval_frames, sample_rate) if eval_frames else 0
        self.num_eval = num_eval if eval_frames else 1
        with ThreadPoolExecutor(8) as pool:
            lengths = list(pool.map(self._length, files))
        self.problems = {i: text for i, text in enumerate(lengths) if isinstance(text, str)}
        self.lengths = [0 if i in self.problems else n for i, n in enumerate(lengths)]  # in samples
        self.plan = self._plan(self.lengths, batch_size)

    def _length(self, file):
        try:
            if self.vad == "none":
                return audio_length(Path(self.root, file), self.sample_rate)
            with reading():
                x = read_crop(Path(self.root, file), channel=self.channel, sample_rate=self.sample_rate).x
                self.kept[file] = spans = kept_spans(x, self.sample_rate, self.vad)
        except AudioError as error:
            return str(error)
        return sum(end - begin for begin, end in spans) or no_speech(self.vad)

    def _plan(self, lengths, batch_size):
        groups = {}
        for index, length in enumerate(lengths):
            if length:
                groups.setdefault(self.crop or max(length, least_samples(self.sample_rate)), []).append(index)
        plan = []
        for length in sorted(groups, reverse=True):  # longest first: running out of memory shows at once
            size = max(1, min(batch_size, 10 * batch_size * self.sample_rate // (length * self.num_eval)))
            members = groups[length]
            plan += [members[i : i + size] for i in range(0, len(members), size)]
        return plan

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, batch):
        read, audio, problems = [], [], Problems()
        for index in self.plan[batch]:
            try:
                with reading():  # what is made of a long recording may need memory that there is not
                    crops, notes = self._read(index)
            except AudioError as error:
                problems[index] = str(error)
                continue
            problems.notes += [(kind, self.files[index], text) for kind, text in notes]
            audio.append(crops)
            read.append(index)
        if not audio:
            return read, torch.empty(0), problems
        stacked = np.stack(audio) if len(audio) > 1 else audio[0][None]  # of a long recording a copy is no small thing
        return read, torch.from_numpy(stacked), problems

    def _read(self, index):
        crop = read_crop(Path(self.root, self.files[index]), channel=self.channel, sample_rate=self.sample_rate)
        x = joined(crop.x, self.kept[self.files[index]]) if self.kept else crop.x
        if len(x) != self.lengths[index] and (self.kept or not self.crop):  # no batch with those of its length
            raise AudioError(f"was changed since the run began: {len(x)} samples, {self.lengths[index]} before")
        return self._crops(x), crop.notes

    def _crops(self, x):
        if not self.crop:
            return wrap_pad(x, least_samples(self.sample_rate))[None]
        x = wrap_pad(x, self.crop + 1)  # one sample more than a crop, as voxceleb_trainer's loadWAV
        starts = np.linspace(0, len(x) - self.crop, self.num_eval).astype(np.int64)
        return np.stack([x[s : s + self.crop] for s in starts])
