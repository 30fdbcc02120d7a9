"""White noise."""

from augmentation import coloured_noise


class Augmentation(coloured_noise.Augmentation):
    """Adds white noise at a ratio of ``snr`` in dB."""

    def __init__(self, snr=(10, 30)):
        super().__init__(snr, (0, 0))
