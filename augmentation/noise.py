"""Noise of musan_path at a signal-to-noise ratio in dB."""

from augmentation.mixing import Mixed


class Augmentation(Mixed):
    """Adds a recording of a folder named noise."""

    category = "noise"

    def __init__(self, snr=(0, 15), count=(1, 1)):
        super().__init__(snr, count)
