"""The random numbers of each crop, by a generator that depends on (seed, epoch, utterance, copy) alone."""

import numpy as np


class Generators:
    """Gives the generator of a crop: one object whose state is set anew, for making one takes as long as a crop.

    Philox is counter-based (Salmon et al. 2011): seed and epoch are its key, the crop's numbers the upper parts of its
    counter, so that no two crops share a number before 2^64 blocks of four are drawn.
    """

    CROP, SPEED = 0, 1  # what numbers are drawn for

    def __init__(self, seed: int):
        self.seed = seed
        self.generator = np.random.Generator(np.random.Philox(0))
        self.state = self.generator.bit_generator.state

    def of(self, epoch: int, utterance: int, copy: int, purpose: int = CROP) -> np.random.Generator:
        """The generator of a crop, which the next call sets anew."""
        self.state["state"] = {"counter": (0, purpose, utterance, copy), "key": (self.seed, epoch)}
        self.generator.bit_generator.state = self.state
        return self.generator
