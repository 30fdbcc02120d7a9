"""Opus, as calls and messages over the internet have it."""

from augmentation.codecs import VariableCodec


class Augmentation(VariableCodec):
    """Encodes and decodes at a bit rate drawn from ``kbps``, from 6 on; ``rate`` is 8000 or 16000 Hz."""

    container, subtype = "OGG", "OPUS"
    limits = (6.0, 256.0)

    def __init__(self, kbps=(6, 24), rate=16000):
        super().__init__(kbps, rate)
