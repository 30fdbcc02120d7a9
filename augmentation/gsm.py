"""GSM 06.10 full rate, 13 kbit/s at 8 kHz."""

from augmentation.codecs import Codec


class Augmentation(Codec):
    """Encodes and decodes at ``rate`` Hz."""

    subtype = "GSM610"

    def __init__(self, rate=8000):
        super().__init__(rate)
