"""MPEG layer III at low bit rates."""

from typing import ClassVar

from augmentation.codecs import VariableCodec


class Augmentation(VariableCodec):
    """Encodes and decodes at 16 kHz at a constant bit rate near one drawn from ``kbps``, from 8 to 160."""

    container, subtype = "MP3", "MPEG_LAYER_III"
    options: ClassVar[dict] = {"bitrate_mode": "CONSTANT"}
    limits = (8.0, 160.0)
    delay = 1105  # 576 samples of LAME's encoder and 529 of a decoder

    def __init__(self, kbps=(16, 48)):
        super().__init__(kbps, 16000)
