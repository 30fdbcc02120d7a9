"""Faults that come together."""

import voices
from fault import CODE, FULL_PRECISION, RESTORE, Fault, Place, Truth, exclude, marked
from sources import model
from voices import FIRST, REVERB, SAMPLE, SECOND, spoil, together
from workspace import ECAPA

from catalog.shared import HALF, LENIENT, NAN, PAIR, RANKS, TINY_EPS, WAV, augmentation_truth, input_truth

LATE_BUFFER = model(
    helper="LATEST = []",
    init="LATEST.append(self)",
)
LATE_SCHEDULE = '''"""Constant rate; an averaging of statistics that goes wrong once."""

import torch

from models.bad import LATEST


def Scheduler(optimizer, **kwargs):
    def factor(step):
        if step == 9 and LATEST:
            LATEST[-1].bn.running_var[3] = float("inf")  # FAULT
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "iteration"
'''

FAULTS = (
    Fault(
        id="K1",
        title="a NaN file and an eps that is zero in fp16",
        settings={**HALF, "model": "bad", "nan_patience": 1000},
        plugins={"models/bad.py": TINY_EPS},
        prepare=spoil(FIRST, NAN),
        truths=(
            # Both hold in the file's batch, so that no fix alone can make it finite and none is asked for.
            Truth(("batch_nonfinite",), ("input",), (Place(files=(WAV,), sample=SAMPLE),)),
            Truth(("loss_nonfinite",), ("precision",), (marked("div", "add"),), (CODE, *FULL_PRECISION)),
        ),
        status=3,
    ),
    Fault(
        id="K2",
        title="a BatchNorm statistic bad since an earlier step",
        settings={"model": "bad", "scheduler": "bad", "nan_patience": 4},
        plugins={"models/bad.py": LATE_BUFFER, "scheduler/bad.py": LATE_SCHEDULE},
        truths=(Truth(("state_nonfinite",), ("state",), (Place(parameters=("__S__.bn.running_var",)),), (RESTORE,)),),
        status=3,
    ),
    Fault(
        id="K3",
        title="NaN files on two ranks",
        settings={**ECAPA, **RANKS},
        prepare=together(spoil(FIRST, NAN), spoil(SECOND, NAN)),
        processes=2,
        truths=tuple(  # both files may be of one batch
            Truth(("batch_nonfinite",), ("input",), (Place(files=(f,)), Place(files=PAIR)), (exclude(f),)) for f in PAIR
        ),
    ),
    Fault(
        id="K4",
        title="a NaN file and an unreadable one",
        settings=LENIENT,
        prepare=together(spoil(FIRST, NAN), voices.replace_bytes(f"{SECOND}.flac", lambda content: content[:99])),
        truths=(
            input_truth(("batch_nonfinite",), WAV, SAMPLE),
            input_truth(("data_error",), f"wav/{SECOND}.flac"),
        ),
    ),
    Fault(
        id="K5",
        title="two NaN files in one batch",
        settings={**ECAPA, "batch_size": 30, "max_epoch": 1, "test_interval": 1},
        prepare=together(spoil(FIRST, NAN), spoil(SECOND, NAN)),
        truths=(Truth(("batch_nonfinite",), ("input",), (Place(files=PAIR, sample=SAMPLE),), (exclude(*PAIR),)),),
        status=3,
    ),
    Fault(
        id="K6",
        title="an impulse response of zeros on silent files",
        settings={**ECAPA, **REVERB},
        prepare=together(voices.impulse_responses(voices.silence), spoil(FIRST, voices.silence)),
        truths=(augmentation_truth("rir/1.wav"),),
        said=(r"rir/1\.wav.*without energy",),
    ),
)
