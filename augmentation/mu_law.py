"""mu-law of ITU-T G.711, as in telephony of America and Japan."""

from augmentation.codecs import Codec


class Augmentation(Codec):
    """Encodes and decodes at ``rate`` Hz."""

    subtype = "ULAW"

    def __init__(self, rate=8000):
        super().__init__(rate)
