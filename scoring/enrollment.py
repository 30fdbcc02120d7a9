"""How much each recording of a speaker counts in the model that they make together."""

import numpy as np

from corpus.acoustics import Acoustics

MOST_SPEECH = 10.0  # seconds beyond which more speech makes an embedding hardly better
HALF_SNR = 20.0  # dB, as ``snr_of`` estimates it, at which a recording counts half of a clean one


def enrollment_weights(recordings: list[Acoustics | None]) -> np.ndarray:
    """Weights (N,) of the recordings of one speaker; 1 each if it is not known how one of them sounds.

    min(net speech, ``MOST_SPEECH``) x S / (S + S_half), S the signal-to-noise ratio as a ratio of powers: the share of
    a recording that is signal, as in a Wiener filter. Only the proportions of the weights matter.
    """
    known = [(recording.speech, recording.snr) for recording in recordings if recording]
    if len(known) < len(recordings):
        return np.ones(len(recordings))
    speech, snr = np.array(known).T
    return np.clip(speech, 0.1, MOST_SPEECH) / (1 + 10 ** ((HALF_SNR - snr) / 10))
