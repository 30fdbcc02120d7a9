"""What must not be blamed (controls C1 to C10), and faults that come together (compounds K1 to K6)."""

import voices
from catalog_data import LENIENT, TRIAL, augmentation_truth, input_truth
from catalog_model import TINY_EPS
from catalog_training import HALF, OVERFLOWS_ONCE, RANKS, WAV, edit_last, scale_found
from fault import CODE, FULL_PRECISION, RESTORE, Fault, Place, Stage, Truth, exclude
from sources import loss, model
from voices import FIRST, NOISE, REVERB, SAMPLE, SECOND, at, spoil, together
from workspace import ECAPA

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

SPIKE = loss(
    """
    logits = self.scale * F.linear(F.normalize(x), F.normalize(self.weight))
    loss = F.cross_entropy(logits, label) * (20.0 if self.spike else 1.0)
    """,
    init="self.spike = False",
    more='''

    def set_epoch(self, epoch):
        """One step costs twenty times as much."""
        self.spike = epoch == 2.0
    ''',
)
GATED = model(
    start="gate = (x.abs().amax(dim=1, keepdim=True) > 1e-4).float()",
    end="return self.fc(x) * gate",
)


def quiet_trial(workspace):
    """A silent test file."""
    path = workspace.data / "wav" / TRIAL
    samples, rate = voices.soundfile.read(path)
    voices.soundfile.write(path, samples * 0.0, rate)


def about_to_grow(state):
    """The next good step doubles the loss scale."""
    state["scaler_state_dict"]["_growth_tracker"] = 1999


def grew_and_fell(workspace):
    """The loss scale must have been doubled and found too high."""
    import torch

    state = torch.load(workspace.run / "model" / "last.model", weights_only=True)["scaler_state_dict"]
    return None if state["_growth_tracker"] < 100 else f"the loss scale did not grow: {state}"


def swap_speakers(workspace):
    """Exchange the names of two speakers in the list: labels mean others, all stays finite."""
    path = workspace.data / "train_list.txt"
    lines = [line.split() for line in path.read_text().splitlines()]
    other = {"train000": "train001", "train001": "train000"}
    path.write_text("".join(f"{other.get(name, name)} {file}\n" for name, file in lines))


def every(change):
    """Settings and preparation of a control with one changed file."""
    return {"settings": ECAPA, "prepare": spoil(FIRST, change)}


CONTROLS = (
    Fault("C1", "silent file, guarded front end", **every(voices.silence)),
    Fault("C2", "samples in the range of int16", settings=ECAPA, prepare=voices.every_file(voices.times(32768.0))),
    Fault("C3", "offset of half of full scale", **every(lambda x: x + 0.5)),
    Fault("C4", "denormal samples", **every(voices.times(1e-39))),
    Fault("C5", "silent noise, guarded mixing", settings={**ECAPA, **NOISE}, prepare=voices.noises(voices.silence)),
    Fault(
        *("C6", "loss scale grows too far", (), {**HALF, "model": "bad", "max_epoch": 1, "test_interval": 1}),
        plugins={"models/bad.py": OVERFLOWS_ONCE},
        more=(Stage(edit_last(about_to_grow), {"max_epoch": 2}),),
        check=grew_and_fell,
    ),
    Fault(
        *("C7", "search for the loss scale in the first steps", (), {**HALF, "model": "bad", "lr": 0.001}),
        plugins={"models/bad.py": OVERFLOWS_ONCE},
        check=scale_found,
    ),
    Fault(
        *("C8", "labels permuted between two runs", (), {**ECAPA, "max_epoch": 1, "test_interval": 1}),
        more=(Stage(swap_speakers, {"max_epoch": 2}),),
    ),
    Fault("C9", "loss twenty times as high for one step", (), {"trainfunc": "bad"}, {"loss/bad.py": SPIKE}),
    Fault(
        *("C10", "zero embedding in the evaluation", (), {"model": "bad", "max_test_pairs": 0}),
        plugins={"models/bad.py": GATED},
        prepare=quiet_trial,
        forbidden=("non-finite", "evaluation failed"),
    ),
)
PAIR = (f"wav/{FIRST}.wav", f"wav/{SECOND}.wav")
NAN = at(SAMPLE, float("nan"))
COMPOUNDS = (
    Fault(
        *("K1", "a NaN file and an eps that is zero in fp16"),
        (
            # Both hold in the file's batch, so that no fix alone can make it finite and none is asked for.
            Truth(("batch_nonfinite",), ("input",), (Place(files=(WAV,), sample=SAMPLE),)),
            Truth(
                ("loss_nonfinite",), ("precision",), (Place(code=True, ops=("div", "add")),), (CODE, *FULL_PRECISION)
            ),
        ),
        {**HALF, "model": "bad", "nan_patience": 1000},
        {"models/bad.py": TINY_EPS},
        spoil(FIRST, NAN),
    ),
    Fault(
        *("K2", "a BatchNorm statistic bad since an earlier step"),
        (Truth(("state_nonfinite",), ("state",), (Place(parameters=("__S__.bn.running_var",)),), (RESTORE,)),),
        {"model": "bad", "scheduler": "bad", "nan_patience": 4},
        {"models/bad.py": LATE_BUFFER, "scheduler/bad.py": LATE_SCHEDULE},
        status=3,
    ),
    Fault(
        *("K3", "NaN files on two ranks"),
        (input_truth(("batch_nonfinite",), PAIR[0], SAMPLE), input_truth(("batch_nonfinite",), PAIR[1], SAMPLE)),
        {**ECAPA, **RANKS},
        prepare=together(spoil(FIRST, NAN), spoil(SECOND, NAN)),
        processes=2,
    ),
    Fault(
        *("K4", "a NaN file and an unreadable one"),
        (
            input_truth(("batch_nonfinite",), WAV, SAMPLE),
            input_truth(("data_error",), f"wav/{SECOND}.flac"),
        ),
        LENIENT,
        prepare=together(spoil(FIRST, NAN), voices.replace_bytes(f"{SECOND}.flac", lambda content: content[:99])),
    ),
    Fault(
        *("K5", "two NaN files in one batch"),
        (Truth(("batch_nonfinite",), ("input",), (Place(files=PAIR, sample=SAMPLE),), (exclude(*PAIR),)),),
        {**ECAPA, "batch_size": 15, "max_epoch": 1, "test_interval": 1},
        prepare=together(spoil(FIRST, NAN), spoil(SECOND, NAN)),
    ),
    Fault(
        *("K6", "an impulse response of zeros on silent files"),
        (augmentation_truth("rir/1.wav"),),
        {**ECAPA, **REVERB},
        prepare=together(voices.impulse_responses(voices.silence), spoil(FIRST, voices.silence)),
        said=(r"rir/1\.wav.*without energy",),
    ),
)
FAULTS = (*CONTROLS, *COMPOUNDS)
