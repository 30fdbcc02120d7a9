"""Which utterances make up the batches of an epoch."""

import numpy as np

from config import Config
from errors import UsageError, plural


class SpeakerBatchSampler:
    """Batches in which a speaker stands once, in an order drawn from (seed, epoch).

    An utterance whose speaker is already in a batch goes to another batch, none is dropped: each speaker's rows are
    dealt to the batches that have the fewest rows so far, ties at random, so batches differ by at most one row. Only
    if a speaker has more rows than there are batches does it stand twice, or, for losses that compare rows
    (``distinct``), are its surplus rows left to another epoch. Under several processes a batch is dealt over the ranks.
    """

    VERSION = 1  # counts the ways in which ``plan`` has dealt rows; a saved position holds under its own only

    def __init__(self, dataset, config: Config, distinct: bool, rank: int = 0, world: int = 1):
        self.dataset, self.distinct, self.rank, self.world = dataset, distinct, rank, world
        self.seed, self.per_row = config.seed, config.nPerSpeaker
        self.max_utterances = config.max_seg_per_spk
        rows = [self._rows_of(len(dataset.utterances_of(s))) for s in range(len(dataset.speakers))]
        self.batches = self._count_batches(rows, config.batch_size)
        self.surplus = sum(max(0, r - self.batches) for r in rows) if distinct else 0
        self.rows = sum(rows) - self.surplus  # of an epoch, over all processes
        self.epoch, self.first = 1, 0

    def _count_batches(self, rows: list[int], batch_size: int) -> int:
        """As few batches as ``batch_size`` allows, fewer if a process would be left with a single row."""

        def smallest(batches):
            used = sum(min(r, batches) for r in rows) if self.distinct else sum(rows)
            return used // batches // self.world

        batches = max(1, -(-sum(rows) // (batch_size * self.world)))
        while batches > 1 and smallest(batches) < 2 <= batch_size:
            batches -= 1
        if smallest(batches) < 2:
            raise UsageError(
                f"batch_size: {batch_size} leaves a process batches of one row ({sum(rows)} rows of {len(rows)} "
                f"speakers, {plural(self.world, 'process')}); batch normalisation needs two"
            )
        return batches

    def _rows_of(self, utterances: int) -> int:
        return -(-min(utterances, self.max_utterances) // self.per_row)

    def set_position(self, epoch: int, first: int = 0):
        """Choose the epoch, and the batch to begin with."""
        self.epoch, self.first = epoch, first

    def __len__(self):
        return self.batches

    def __iter__(self):
        for batch in self.plan(self.epoch)[self.first :]:
            yield [(self.epoch, row) for row in batch[self.rank :: self.world]]

    def plan(self, epoch: int) -> list[list[tuple]]:
        """All batches of an epoch, each a list of rows ((utterance, copy), ...)."""
        rng = np.random.default_rng([self.seed, epoch])
        batches = [[] for _ in range(self.batches)]
        fill = np.zeros(self.batches, np.int64)
        for speaker in rng.permutation(len(self.dataset.speakers)):
            rows = self._speaker_rows(speaker, rng)
            if self.distinct:
                rows = rows[: self.batches]
            for begin in range(0, len(rows), self.batches):
                part = rows[begin : begin + self.batches]
                emptiest = np.argsort(fill + rng.random(self.batches), kind="stable")[: len(part)]
                fill[emptiest] += 1
                for batch, row in zip(emptiest, part):
                    batches[batch].append(row)
        return batches

    def _speaker_rows(self, speaker, rng):
        """Rows of ``per_row`` utterances of one speaker; the last is filled up with others of the same speaker."""
        chosen = rng.permutation(self.dataset.utterances_of(speaker))[: self.max_utterances]
        missing = -len(chosen) % self.per_row
        filled = np.concatenate([chosen, np.resize(chosen, missing)]) if missing else chosen
        rows = []
        for begin in range(0, len(filled), self.per_row):
            row = filled[begin : begin + self.per_row].tolist()
            rows.append(tuple((u, begin + i if begin + i >= len(chosen) else 0) for i, u in enumerate(row)))
        return rows
