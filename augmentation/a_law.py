"""A-law of ITU-T G.711, as in telephony of Europe."""

from augmentation.codecs import Codec


class Augmentation(Codec):
    """Encodes and decodes at ``rate`` Hz."""

    subtype = "ALAW"

    def __init__(self, rate=8000):
        super().__init__(rate)
