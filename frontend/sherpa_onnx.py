"""Kaldi's log-mel filter bank as sherpa-onnx computes it, for models that are to run there (export.py --for)."""

from frontend.chains import Chain


class FrontEnd(Chain):
    """Logarithm of ``n_mels`` Kaldi filters from 20 Hz to 400 Hz below half the rate, a frame for each 10 ms."""

    def __init__(self, n_mels=80, sample_rate=16000):
        super().__init__("sherpa-onnx", n_mels, sample_rate=sample_rate)
