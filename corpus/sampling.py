"""Which utterances make up the batches of an epoch."""

import itertools
import math

import numpy as np

from config import Config
from errors import UsageError, plural

BLOCK = 1 << 20  # utterances that are shuffled together
ROWS = 1 << 16  # rows whose utterances are looked up together
POWERS = {"count": 1.0, "sqrt": 0.5, "uniform": 0.0}  # of a speaker's rows: what its share of an epoch goes by


def whole(rows: float) -> int:
    """The whole rows in a sum of shares."""
    return math.floor(rows + 1e-6)


class SpeakerBatchSampler:
    """Batches in which a speaker stands once, in an order drawn from (seed, epoch).

    The rows of all speakers, speaker by speaker in random order, are dealt in rounds: a round gives a row to every
    batch, in an order of its own. So batches differ by at most one row, and a speaker stands in a batch once; only if
    it has more rows than there are batches does it stand twice, or, for losses that compare rows (``distinct``), are
    its surplus rows left to another epoch. None is dropped to make all batches equal: an epoch has two sizes of batches
    at most, for each of which a compiled model is compiled once. Under several processes a batch is dealt over the
    ranks, and each of them has two sizes at most again.

    ``sampling`` gives a speaker rows by its ``count``, the square root of that, or each the same (``uniform``), and the
    weight of a list multiplies them; the utterances of one that is given more than it has come again, as other crops.
    A share that is no whole number is rounded up in some epochs and down in others, at random, so that every epoch has
    the same number of rows.

    An epoch that was begun with other sizes of batches goes on with the rows that are left of it: ``dealt`` says how it
    was dealt before, [(batches, batches of these that are done)], and the rest is dealt again over batches of this
    sampler's size. They are the last ones of the epoch's ``batches``, so that a position is about the same share of an
    epoch as before.
    """

    VERSION = 3  # counts the ways in which rows were dealt and crops drawn; a saved position holds under its own only

    def __init__(self, dataset, config: Config, distinct: bool, rank: int = 0, world: int = 1):
        self.dataset, self.distinct, self.rank, self.world = dataset, distinct, rank, world
        self.seed, self.per_row = config.seed, config.nPerSpeaker
        self.most = config.max_seg_per_spk
        self.units = Units(dataset)
        shares = self._shares(config.sampling)
        rows = np.add.reduceat(shares, self.units.speaker_starts)
        self.wanted, self.batch_size = shares, config.batch_size
        self.batches = self._count_batches(rows, config.batch_size)
        self.rows = whole(self._shares_of(self.batches).sum())  # of an epoch, over all processes
        self.surplus = whole(rows.sum()) - self.rows
        self.epoch, self.first, self.dealt = 1, 0, ()

    def _shares(self, sampling: str) -> np.ndarray:
        """Rows that each unit has in an epoch, on average."""
        units, most = self.units, -(-self.most // self.per_row)
        rows = -(-np.minimum(units.counts, self.most) // self.per_row).astype(np.float64)
        strength = units.weights * rows ** POWERS[sampling]
        shares = strength * ((units.weights * rows).sum() / strength.sum())
        if sampling == "count":
            shares = strength  # and not what rounding leaves of it
        return self._limited(shares, most)

    def _shares_of(self, batches: int) -> np.ndarray:
        """Rows that each unit has in an epoch of so many batches, on average."""
        return self._limited(self.wanted, batches) if self.distinct else self.wanted

    def _limited(self, shares: np.ndarray, most: int) -> np.ndarray:
        """The shares with no more than ``most`` rows of a speaker."""
        starts = self.units.speaker_starts
        rows = np.add.reduceat(shares, starts)
        factor = np.where(rows > most, most / np.maximum(rows, 1e-9), 1.0)
        limited = shares * np.repeat(factor, np.diff(starts, append=len(shares)))
        return np.where(np.abs(limited - np.rint(limited)) < 1e-9, np.rint(limited), limited)

    def _count_batches(self, rows: np.ndarray, batch_size: int) -> int:
        """As few batches as ``batch_size`` allows, fewer if a process would be left with a single row."""
        total = whole(rows.sum())

        def smallest(batches):
            used = whole(np.minimum(rows, batches).sum()) if self.distinct else total
            return used // batches // self.world

        batches = max(1, -(-total // (batch_size * self.world)))
        while batches > 1 and smallest(batches) < 2 <= batch_size:
            batches -= 1
        if smallest(batches) < 2:
            raise UsageError(
                f"batch_size: {batch_size} leaves a process batches of one row ({total} rows of {len(rows)} "
                f"speakers, {plural(self.world, 'process')}); batch normalisation needs two"
            )
        return batches

    def set_position(self, epoch: int, first: int = 0, dealt=()):
        """Choose the epoch, the batch to begin with, and how the epoch was ``dealt`` before."""
        self.epoch, self.first, self.dealt = epoch, first, dealt

    def __len__(self):
        return self.batches

    def __iter__(self):
        plan = self.plan(self.epoch, self.dealt)
        before = self.batches - len(plan)  # in the place of batches that were dealt before
        for batch in range(self.first, self.batches):
            yield [(self.epoch, row) for row in plan.rows(batch - before, self.rank, self.world)]

    def plan(self, epoch: int, dealt=()) -> "Plan":
        """All batches of an epoch, each a list of rows ((utterance, copy), ...); of one that was dealt, those left."""
        rng = np.random.default_rng([self.seed, epoch])
        first = dealt[0][0] if dealt else self.batches
        unit, number = self._rows(self._shares_of(first), rng)
        batches = _deal(_begins(self.units.speakers[unit]), len(unit), first, rng)
        left_out = 0
        for turn, (_, done) in enumerate(dealt):
            speakers = self.units.speakers[unit]
            left = np.sort(batches[:, done:], axis=None)
            left = left[left >= 0]
            size = dealt[turn + 1][0] if turn + 1 < len(dealt) else self._count_left(speakers[left])
            kept = left[_number_in_run(speakers[left]) < size] if self.distinct or not size else left
            left_out = len(left) - len(kept)
            rng_again = np.random.default_rng([self.seed, epoch, turn])
            again = _deal(_begins(speakers[kept]), len(kept), size, rng_again)
            batches = np.where(again >= 0, kept[again], -1) if len(kept) else again
        return Plan(*self._utterances(unit, number, batches, rng), left_out)

    def _count_left(self, speakers: np.ndarray) -> int:
        """Batches for rows that are left of an epoch, each of ``speakers`` (rows,); 0 if they are too few for one."""
        runs = _number_in_run(speakers) + 1
        batches = -(-len(speakers) // (self.batch_size * self.world))
        if self.distinct and len(runs):
            batches = max(batches, int(runs.max()))
        batches = min(batches, self.batches)

        def smallest():
            used = int((runs <= batches).sum()) if self.distinct else len(speakers)
            return used // batches // self.world

        while batches and smallest() < 2:
            batches -= 1
        return batches

    def _rows(self, shares: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
        """The unit of each row of an epoch, speaker by speaker in random order, and its number within the unit.

        ``shares``: rows of each unit.
        """
        units, rows = self.units, whole(shares.sum())
        order = np.argsort(rng.permutation(len(units.speaker_starts))[units.speakers], kind="stable").astype(np.int32)
        shares = shares[order]
        edges = np.cumsum(shares)
        edges *= rows / edges[-1]  # which is 1 if the shares are whole numbers
        shift = rng.random() if (shares % 1).any() else 0.0
        edges = np.minimum(np.floor(edges + shift), rows)
        edges[-1] = rows
        counts = np.diff(edges, prepend=0.0).astype(np.int64)
        number = np.arange(rows, dtype=np.int32)
        number -= np.repeat((np.cumsum(counts) - counts).astype(np.int32), counts)
        number = number.astype(np.min_scalar_type(int(counts.max(initial=0))))
        return np.repeat(order, counts), number

    def _utterances(self, unit, number, batches, rng) -> tuple[np.ndarray, np.ndarray]:
        """Utterances and copies (rounds, batches, per_row) of all batches: a unit's in random order, round and round.

        ``unit`` and ``number`` (rows,) of each row; ``batches`` (rounds, batches) as they were dealt, which may be
        written over: millions of rows take room.
        """
        units, shuffled = self.units, np.empty(self.units.counts.sum(), np.int32)
        ends = np.searchsorted(units.starts, np.arange(BLOCK, len(shuffled), BLOCK))
        edges = np.unique(np.append(units.starts[ends[ends < len(units.starts)]], [0, len(shuffled)]))
        for begin, end in itertools.pairwise(edges.tolist()):  # whole units at a time: all at once take much memory
            first, last = np.searchsorted(units.starts, [begin, end])
            keys = np.repeat(np.arange(last - first, dtype=np.float64), units.counts[first:last])
            keys += rng.random(end - begin)
            shuffled[begin:end] = units.at(begin + np.argsort(keys, kind="stable"))  # stable: so on every machine
        used = np.minimum(units.counts, self.most)
        row_of = batches.reshape(-1)
        utterances = row_of[:, None] if self.per_row == 1 else np.empty((len(row_of), self.per_row), np.int32)
        most = int(number.max(initial=0) + 1) * self.per_row
        copies = np.empty(utterances.shape, np.min_scalar_type(most))
        for begin in range(0, len(row_of), ROWS):
            part = slice(begin, begin + ROWS)
            rows = row_of[part].copy()
            units_here = unit[rows]
            slot = number[rows, None].astype(np.int64) * self.per_row + np.arange(self.per_row)
            copies[part], place = np.divmod(slot, used[units_here, None])
            utterances[part] = shuffled[units.starts[units_here, None] + place]
            utterances[part][rows < 0] = -1
        shape = *batches.shape, self.per_row
        return utterances.reshape(shape), copies.reshape(shape)


def by_speaker(labels: np.ndarray) -> np.ndarray | None:
    """Utterance numbers (N,) int32 sorted by label, those of a label in the order of the list; None: it is that order.

    Nothing is kept of lists that name one speaker after the other, as most do.
    """
    return None if (labels[1:] >= labels[:-1]).all() else np.argsort(labels, kind="stable").astype(np.int32)


class Units:
    """The utterances of each speaker in each list, which the sampler gives rows to; sorted by speaker, then by list.

    ``counts``, ``starts`` (places, of which ``at`` tells the utterances), ``speakers`` and ``weights`` of each unit;
    ``speaker_starts``: the first unit of each speaker.
    """

    def __init__(self, dataset):
        parts = getattr(dataset, "parts", None)  # number of the list of each utterance, which rises with it
        self.order = getattr(dataset, "order", None)
        if self.order is None:
            self.order = by_speaker(dataset.labels)
        labels = self._sorted(np.asarray(dataset.labels, np.int32))
        new = np.append(True, labels[1:] != labels[:-1])
        part = np.zeros(1, np.int64)
        if parts is not None:
            part = self._sorted(parts)
            new[1:] |= part[1:] != part[:-1]
        self.starts = np.flatnonzero(new).astype(np.int32)
        self.counts = np.diff(self.starts, append=np.int32(len(labels)))
        self.speakers = labels[self.starts]
        one = np.broadcast_to(1.0, len(self.starts))
        self.weights = one if parts is None else np.asarray(dataset.weights, np.float64)[part[self.starts]]
        self.speaker_starts = _begins(self.speakers)

    def _sorted(self, values: np.ndarray) -> np.ndarray:
        """Values (N,) of utterances, by speaker."""
        return values if self.order is None else values[self.order]

    def at(self, places: np.ndarray) -> np.ndarray:
        """The utterances at places among those sorted by speaker."""
        return places if self.order is None else self.order[places]


class Plan:
    """The batches of an epoch, as arrays; a sequence of lists of rows ((utterance, copy), ...).

    ``utterances`` (rounds, batches, utterances of a row), -1 where a round has none for a batch; ``copies`` of these.
    ``left_out``: rows of an epoch that was dealt again that wait for another one.
    """

    def __init__(self, utterances: np.ndarray, copies: np.ndarray, left_out: int = 0):
        self.utterances, self.copies, self.left_out = utterances, copies, left_out

    @property
    def size(self) -> int:
        """Rows of all batches."""
        return int((self.utterances[:, :, 0] >= 0).sum())

    def __len__(self):
        return self.utterances.shape[1]

    def __getitem__(self, batch: int) -> list[tuple]:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        return self.rows(batch)

    def __eq__(self, other):
        return isinstance(other, Plan) and list(self) == list(other)

    def rows(self, batch: int, rank: int = 0, world: int = 1) -> list[tuple]:
        """The rows of a batch that a rank has."""
        there = self.utterances[:, batch, 0] >= 0
        both = (array[:, batch][there][rank::world].tolist() for array in (self.utterances, self.copies))
        return [tuple(zip(utterances, copies)) for utterances, copies in zip(*both)]


def _number_in_run(speakers: np.ndarray) -> np.ndarray:
    """The number of each row within its speaker's, where equal ``speakers`` (rows,) stand side by side."""
    begins = _begins(speakers)
    return np.arange(len(speakers)) - np.repeat(begins, np.diff(begins, append=len(speakers)))


def _begins(speakers: np.ndarray) -> np.ndarray:
    """Where each speaker begins, if equal ``speakers`` (rows,) stand side by side."""
    return np.flatnonzero(np.append(True, speakers[1:] != speakers[:-1])[: len(speakers)]).astype(np.int32)


def _deal(begins: np.ndarray, rows: int, batches: int, rng) -> np.ndarray:
    """Deal rows, those of a speaker from one of ``begins`` to the next: (rounds, batches) row numbers, -1 for none.

    Round k gives the rows from k x batches on to the batches in random order. A speaker whose rows go on from a round
    to a later one gets the batches there that it had not in its first round.
    """
    rounds = -(-rows // max(batches, 1))
    dealt = np.full((rounds, batches), -1, np.int32)
    ends = np.append(begins[1:], rows)
    for number in range(rounds):
        first = number * batches
        order = rng.permutation(batches)
        owner = np.searchsorted(begins, first, side="right") - 1
        begin, here = begins[owner], min(ends[owner] - first, batches)
        if begin < first and here < batches:
            had = dealt[begin // batches, order] >= begin
            sorted_out = order[np.argsort(had, kind="stable")]
            order = np.append(sorted_out[:here], rng.permutation(sorted_out[here:]))
        count = min(rows - first, batches)
        dealt[number, order[:count]] = np.arange(first, first + count)
    return dealt
