"""Data: audio files, noise, and what becomes of them in a batch."""

import numpy as np
import soundfile
import voices
from fault import Fault, Place, Truth, exclude
from voices import FIRST, NOISE, RATE, SAMPLE, SECOND, at, spoil, together
from workspace import ECAPA

from catalog.shared import NAN, PAIR, input_truth

LOSS_OR_BATCH = ("loss_nonfinite", "batch_nonfinite")
BATCH = ("batch_nonfinite",)


def rewritten(change, name=FIRST, rate=RATE):
    """A preparation: an utterance becomes what ``change`` makes of its samples, at another rate."""

    def prepare(workspace):
        path = voices.rewrite(workspace, name, lambda samples: None)
        samples, _ = soundfile.read(path)
        soundfile.write(path, change(samples), rate, subtype="FLOAT")

    return prepare


def old_telephone(samples):
    """8 kHz, with a NaN at its sample 3000."""
    samples = samples[::2].copy()
    samples[3000] = np.nan
    return samples


def right_channel(samples):
    """Two channels, a NaN in the second."""
    both = np.stack([samples, 0.5 * samples], axis=1)
    both[SAMPLE, 1] = np.nan
    return both


def short(samples):
    """Shorter than a crop, a NaN near the end."""
    samples = samples[:7000].copy()
    samples[6900] = np.nan
    return samples


def normalised_by_zero(samples):
    """Divided by a peak that was 0."""
    return samples * np.float64("nan")


def bad_music(workspace):
    """A NaN in one music and one babble file."""
    voices.noises(lambda samples: samples)(workspace)
    for name in ("music/2.wav", "speech/0.wav"):
        path = workspace.data / "musan" / name
        samples, _ = soundfile.read(path)
        samples[8000] = np.nan
        soundfile.write(path, samples, RATE, subtype="FLOAT")


NOISES = ("musan/music/2.wav", "musan/speech/0.wav")  # drawn in one batch, so that one dump has both
VIEWS = {"nPerSpeaker": 2, "batch_size": 3, "trainfunc": "angleproto"}

FAULTS = (
    Fault(
        id="H55",
        title="8 kHz file with a NaN: its own sample index",
        settings=ECAPA,
        prepare=rewritten(old_telephone, rate=8000),
        truths=(input_truth(BATCH, sample=3000),),
        said=(FIRST,),
    ),
    Fault(
        id="H56",
        title="a NaN in the second channel only",
        settings=ECAPA,
        prepare=rewritten(right_channel),
        truths=(input_truth(BATCH, sample=SAMPLE),),
        said=(FIRST,),
    ),
    Fault(
        id="H57",
        title="a NaN near the end of a file that is repeated",
        settings=ECAPA,
        prepare=rewritten(short),
        truths=(input_truth(BATCH, sample=6900),),
        said=(FIRST,),
    ),
    Fault(
        id="H58",
        title="a file of the constant 1e30",
        settings=ECAPA,
        prepare=spoil(FIRST, lambda samples: samples * 0 + 1e30),
        truths=(input_truth(LOSS_OR_BATCH),),
    ),
    Fault(
        id="H59",
        title="one sample of 1e20 in good speech",
        settings=ECAPA,
        prepare=spoil(FIRST, at(SAMPLE, 1e20)),
        truths=(input_truth(LOSS_OR_BATCH, sample=SAMPLE),),
    ),
    Fault(
        id="H60",
        title="NaN in a music and in a babble file",
        settings={**ECAPA, **NOISE},
        prepare=bad_music,
        truths=(Truth(("data_error",), ("augmentation",), (Place(files=NOISES, sample=8000),), (exclude(*NOISES),)),),
        said=(r"music/2\.wav.*non-finite", r"speech/0\.wav.*non-finite"),
    ),
    Fault(
        id="H61",
        title="a NaN file in a pair loss",
        settings={**ECAPA, **VIEWS},
        prepare=spoil(FIRST, NAN),
        truths=(input_truth(BATCH, sample=SAMPLE),),
    ),
    Fault(
        id="H62",
        title="a NaN file at three speeds",
        settings={**ECAPA, "speed_perturb": True, "max_epoch": 1, "test_interval": 1},
        prepare=spoil(FIRST, NAN),
        truths=(input_truth(BATCH, sample=SAMPLE),),
    ),
    Fault(
        id="H63",
        title="an all-NaN file and one with an Inf in one batch",
        settings={**ECAPA, "batch_size": 30, "max_epoch": 1, "test_interval": 1},
        prepare=together(spoil(FIRST, normalised_by_zero), spoil(SECOND, at(SAMPLE, -np.inf))),
        truths=(Truth(BATCH, ("input",), (Place(files=PAIR),), (exclude(*PAIR),)),),
        status=3,
    ),
)
