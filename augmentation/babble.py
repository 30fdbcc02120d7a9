"""Voices of musan_path that talk at the same time, each at a signal-to-noise ratio in dB."""

from augmentation.mixing import Mixed


class Augmentation(Mixed):
    """Adds ``count`` recordings of folders named speech; a draw has this name, as that of MUSAN's category."""

    category = "speech"

    def __init__(self, snr=(13, 20), count=(3, 7)):
        super().__init__(snr, count)
