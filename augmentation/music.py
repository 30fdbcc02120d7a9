"""Music of musan_path at a signal-to-noise ratio in dB."""

from augmentation.mixing import Mixed


class Augmentation(Mixed):
    """Adds a recording of a folder named music."""

    category = "music"

    def __init__(self, snr=(5, 15), count=(1, 1)):
        super().__init__(snr, count)
