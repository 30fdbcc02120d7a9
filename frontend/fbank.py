"""Kaldi's log-mel filter bank, as wespeaker, 3D-Speaker and most recipes of today have it."""

from frontend.chains import Chain


class FrontEnd(Chain):
    """Logarithm of ``n_mels`` Kaldi filters from 20 Hz to half the rate, of 16-bit samples, without dither."""

    def __init__(self, n_mels=80, sample_rate=16000):
        super().__init__("wespeaker", n_mels, sample_rate=sample_rate)
