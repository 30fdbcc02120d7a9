"""Log-mel power of centred windows, as voxceleb_trainer computes it."""

from frontend.chains import Chain


class FrontEnd(Chain):
    """Logarithm of ``n_mels`` mel powers up to half the rate; ``preemphasis`` filters the waveform by 1 - 0.97 z^-1."""

    def __init__(self, n_mels=40, preemphasis=False, sample_rate=16000):
        super().__init__("voxceleb_trainer", n_mels, True, preemphasis, sample_rate=sample_rate)
