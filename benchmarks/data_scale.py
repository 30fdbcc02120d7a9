"""Measure how a train list of any size starts: the plan of an epoch, reading, memory, the first batch.

python benchmarks/data_scale.py plan                      # an epoch dealt, at the sizes of known sets
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from config import Config
from corpus.sampling import SpeakerBatchSampler

# (utterances, speakers, rows of a batch, utterances of a row): VoxCeleb2 twice, VoxBlink2, and a set to come.
SIZES = [(1_092_009, 5_994, 200, 1), (1_092_009, 5_994, 200, 2), (9_904_382, 111_284, 512, 1)]
SIZES.append((10_000_000, 1_000_000, 512, 1))


class Speakers:
    """Stands for a data set: speakers with numbers of utterances that spread as those of real ones do."""

    def __init__(self, utterances: int, speakers: int):
        weights = np.random.default_rng(0).lognormal(0, 0.5, speakers)
        counts = np.maximum(1, np.rint(weights / weights.sum() * utterances)).astype(int)
        counts[np.argmax(counts)] += utterances - counts.sum()
        self.labels = np.repeat(np.arange(speakers, dtype=np.int32), counts)


def plan(_):
    """Print the seconds of CPU that dealing an epoch takes."""
    for utterances, speakers, batch_size, per_row in SIZES:
        dataset = Speakers(utterances, speakers)
        config = Config(batch_size=batch_size, nPerSpeaker=per_row)
        began = time.process_time()
        sampler = SpeakerBatchSampler(dataset, config, per_row > 1)
        ready = time.process_time()
        sampler.plan(1)
        dealt = time.process_time()
        print(
            f"{utterances:,} utterances of {speakers:,} speakers, {len(sampler):,} batches of {batch_size} x {per_row}:"
            f" sampler {ready - began:.2f} s, plan of an epoch {dealt - ready:.2f} s"
        )


def main():
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("plan", help="the plan of an epoch").set_defaults(run=plan)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
