"""Optimizer, schedule, loss scale, state, processes and the environment."""

import voices
from fault import CODE, RESTORE, Fault, Place, Stage, Truth, exclude, marked, put
from sources import model
from voices import FIRST, SAMPLE, at, spoil
from workspace import ECAPA

from catalog.shared import (
    CLAMPED,
    HALF,
    OVERFLOWS_ONCE,
    PLAIN,
    RANKS,
    SGD,
    STOPPED,
    WAV,
    below,
    edit_last,
    scale_found,
    start_over,
)

OPTIMIZER = '''"""Adam with something of its own after a step."""

import torch


class Special(torch.optim.Adam):
    steps = 0

    def step(self, closure=None):
        result = super().step(closure)
        self.steps += 1
        if self.steps == 5:
            chosen = [p for p in self.param_groups[0]["params"] if p.dim() == 3][0]
            {action}
        return result


def Optimizer(parameters, lr=0.001, **kwargs):
    return Special(parameters, lr=lr)
'''
POISON_MOMENT = OPTIMIZER.format(action='self.state[chosen]["exp_avg"][0, 0, 0] = float("nan")  # FAULT')
FLIP_BIT = OPTIMIZER.format(action="chosen.data.view(torch.int32)[0, 0, 0] ^= 1 << 30  # FAULT")
NAN_SCHEDULE = '''"""A cycle whose length is worked out wrongly."""

import torch


def Scheduler(optimizer, lr=0.001, **kwargs):
    def factor(step):
        position = torch.tensor(float(max(step - 5, 0)))
        return float(1.0 - position / position) if step > 4 else 1.0  # FAULT

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "iteration"
'''
DEAD_PARAMETER = model(
    init="self.language = nn.Parameter(torch.ones(8))  # of a data set that is switched off",
    pool="x = x.mean(dim=2) + 0.0 * self.language",
)
# A normalisation that only watches: its statistics overflow, its output is not used.
WATCHER = model(
    init="self.watch = nn.BatchNorm1d(channels)",
    start="loudest = x.abs().mean(dim=1).amax()",
    middle="""
    if self.training:
        self.watch(x * torch.where(loudest > 0.9, 3e38, 1.0))  #!
    x = F.relu(self.bn(x))
    """,
)
ONCE = model(
    helper="from pathlib import Path",
    middle="""
    x = F.relu(self.bn(x))
    stamp = Path(__file__).with_suffix(".stamp")
    if self.training and not stamp.exists():
        stamp.touch()
        spike = torch.zeros_like(x)
        spike[0, 3, 2] = math.inf
        x = x + spike  #!
    """,
)
FLAT = model(
    middle="x = self.bn(x)",
    pool="""
    mean = x.mean(dim=2, keepdim=True)
    deviation = torch.sqrt((x - mean).square().mean(dim=2))  #!
    x = torch.cat([mean.squeeze(2), deviation], dim=1)
    """,
    width=16,
)
DRIFT = model(
    init="self.calls = 0",
    middle="""
    x = F.relu(self.bn(x))
    self.calls += 1
    if self.calls == 4 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
        self.fc.weight.data += 1e-3  #!
    """,
)


def poison_weight(state):
    """One NaN in a weight."""
    state["model_state_dict"]["__S__.conv.weight"].view(-1)[0] = float("nan")


def poison_moment(state):
    """One NaN in a moment of Adam."""
    state["optimizer_state_dict"]["state"][0]["exp_avg"].view(-1)[0] = float("nan")


def no_scale(state):
    """A loss scale of 0."""
    state["scaler_state_dict"]["scale"] = 0.0


STORM = [f"train00{speaker}/session{number % 4}/{number:05d}" for speaker in range(6) for number in (1, 4)]
STORM_FILES = tuple(f"wav/{name}.wav" for name in STORM)
WEIGHT = ("__S__.conv.weight", "S.conv.weight", "conv.weight")
MOMENT = (*WEIGHT, "optimizer.0.exp_avg", "__S__.conv.weight.exp_avg", "exp_avg.__S__.conv.weight")
BUFFER = ("__S__.watch.running_var", "__S__.watch.running_mean")
LOWER_LR = (put("lr", below(0.5)),)

FAULTS = (
    Fault(
        id="F37",
        title="SGD at lr 50, plain softmax",
        settings={**SGD, "model": "Plain", "lr": 50.0},
        plugins={"models/Plain.py": PLAIN},
        truths=(Truth(STOPPED, ("optimizer",), (Place(keys=("lr",)),), LOWER_LR),),
        status=3,
    ),
    Fault(
        id="F37b",
        title="SGD at lr 1e3",
        settings={**SGD, "model": "Plain", "lr": 1e3},
        plugins={"models/Plain.py": PLAIN},
        truths=(Truth(STOPPED, ("optimizer",), (Place(keys=("lr",)),), LOWER_LR),),
        status=3,
    ),
    Fault(
        id="F37c",
        title="SGD at lr 1e6",
        settings={**SGD, "model": "Plain", "lr": 1e6},
        plugins={"models/Plain.py": PLAIN},
        truths=(Truth(STOPPED, ("optimizer",), (Place(keys=("lr",)),), LOWER_LR),),
        status=3,
    ),
    Fault(
        id="F38",
        title="lr 1e6 with BatchNorm and AAM: diverges, finite",
        settings={"optimizer": "sgd", "lr": 1e6},
    ),
    Fault(
        id="F39",
        title="lr x weight decay above 2",
        settings={**SGD, "model": "Plain", "lr": 0.1, "weight_decay": 50.0, "momentum": 0.0},
        plugins={"models/Plain.py": PLAIN},
        truths=(
            Truth(
                STOPPED,
                ("optimizer",),
                (Place(keys=("weight_decay",)),),
                (put("weight_decay", lambda v: 0 <= v <= 15),),
            ),
        ),
        status=3,
    ),
    Fault(
        id="F40",
        title="momentum 1.2",
        settings={**SGD, "model": "Plain", "lr": 0.01, "momentum": 1.2, "max_epoch": 60, "test_interval": 60},
        plugins={"models/Plain.py": PLAIN},
        truths=(
            Truth(STOPPED, ("optimizer",), (Place(keys=("momentum",)),), (put("momentum", lambda v: 0 <= v < 1),)),
        ),
        status=3,
    ),
    Fault(
        id="F41",
        title="the schedule returns NaN",
        settings={"scheduler": "bad", "nan_patience": 4},
        plugins={"scheduler/bad.py": NAN_SCHEDULE},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(keys=("lr", "scheduler"))),
                (CODE, RESTORE, put("scheduler", lambda v: v != "bad")),
            ),
        ),
        status=3,
    ),
    Fault(
        id="F42",
        title="Adam eps 0 and a gradient of exactly zero",
        settings={"model": "bad", "eps": 0.0, "nan_patience": 4},
        plugins={"models/bad.py": DEAD_PARAMETER},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (Place(keys=("eps", "__S__.language")),),
                (put("eps", lambda v: v > 0),),
            ),
        ),
        status=3,
    ),
    Fault(
        id="F43",
        title="NaN in a moment of Adam",
        settings={"optimizer": "bad", "nan_patience": 4},
        plugins={"optimizer/bad.py": POISON_MOMENT},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("state", "optimizer"),
                (Place(parameters=MOMENT), marked()),
                (RESTORE, CODE, put("optimizer", lambda v: v != "bad")),
            ),
        ),
        status=3,
    ),
    Fault(
        id="F43b",
        title="resume from a NaN moment: refused",
        settings={"max_epoch": 1},
        more=(Stage(edit_last(poison_moment), {"max_epoch": 2}, 2),),
        said=("tensors are not finite.*optimizer.0.exp_avg",),
    ),
    Fault(
        id="F47",
        title="loss scale 2^16 on a fresh net: searched, no dump",
        settings={**HALF, "model": "bad"},
        plugins={"models/bad.py": OVERFLOWS_ONCE},
        check=scale_found,
    ),
    Fault(
        id="F48",
        title="a bad file in nearly every batch, fp16",
        settings={**HALF, "max_epoch": 4, "test_interval": 4, "nan_patience": 1000, "max_bad_files_pct": 100},
        prepare=voices.together(*(spoil(name, at(SAMPLE, float("nan"))) for name in STORM)),
        truths=(
            Truth(
                ("batch_nonfinite",),
                ("input",),
                (Place(among=STORM_FILES, sample=SAMPLE),),
                (exclude(*STORM_FILES),),
            ),
        ),
    ),
    Fault(
        id="F51",
        title="initial model with a NaN weight: refused",
        settings={"max_epoch": 1},
        more=(
            Stage(
                voices.together(edit_last(poison_weight), start_over),
                {"initial_model": "@initial.model"},
                2,
            ),
        ),
        said=("tensors are not finite.*__S__.conv.weight",),
    ),
    Fault(
        id="F52",
        title="an exponent bit of a weight flips",
        settings={"optimizer": "bad", "nan_patience": 4},
        plugins={"optimizer/bad.py": FLIP_BIT},
        truths=(
            Truth(
                ("loss_nonfinite", "state_nonfinite", "grad_nonfinite"),
                ("state",),
                (Place(parameters=WEIGHT),),
                (RESTORE,),
            ),
        ),
        status=3,
    ),
    Fault(
        id="F53",
        title="a BatchNorm statistic overflows in the forward pass",
        settings={"model": "bad", "nan_patience": 1000},
        plugins={"models/bad.py": WATCHER},
        prepare=spoil(FIRST, voices.square_wave),
        truths=(
            Truth(
                ("state_nonfinite",),
                ("state", "model_forward"),
                (Place(parameters=BUFFER), marked()),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="F54",
        title="resume with loss scale 0: refused",
        settings={**HALF, "max_epoch": 1},
        more=(Stage(edit_last(no_scale), {"max_epoch": 2}, 2),),
        said=("loss scale is 0.0",),
    ),
    Fault(
        id="F55",
        title="NaN file on one of two ranks",
        settings={**RANKS, "max_epoch": 1},
        prepare=spoil(FIRST, at(SAMPLE, float("nan"))),
        processes=2,
        truths=(
            Truth(
                ("batch_nonfinite",),
                ("input", "distributed"),
                (Place(files=(WAV,), sample=SAMPLE, named_rank=True),),
                (exclude(WAV),),
            ),
        ),
    ),
    Fault(
        id="F55b",
        title="finite losses, NaN gradient on one rank, first on rank 0",
        settings={**RANKS, "model": "bad"},
        plugins={"models/bad.py": FLAT},
        prepare=spoil(FIRST, voices.silence),
        processes=2,
        truths=(
            Truth(
                ("grad_nonfinite",),
                ("model_backward", "distributed"),
                (Place(code=True, ops=("sqrt",), rank=0),),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="F56",
        title="loss NaN on one rank: all leave the step out together",
        settings={**RANKS, **ECAPA},
        prepare=spoil(FIRST, voices.times(1e18)),
        processes=2,
        seconds=60,
        truths=(Truth(("loss_nonfinite",), ("input", "distributed"), (Place(files=(WAV,)),), (exclude(WAV),)),),
    ),
    Fault(
        id="F57",
        title="weights of rank 1 drift",
        settings={**RANKS, "model": "bad"},
        plugins={"models/bad.py": DRIFT},
        processes=2,
        status=7,
        said=("(?i)(rank|process).*(differ|diverge)",),
    ),
    Fault(
        id="F58",
        title="an activation is Inf once",
        settings={"model": "bad"},
        plugins={"models/bad.py": ONCE},
        truths=(Truth(("loss_nonfinite",), ("environment",)),),
    ),
    Fault(
        id="F59",
        title="two threads: the replay uses as many",
        settings={"trainfunc": "bad", "threads": 2, "model": "ECAPA_TDNN", "channels": 32, "n_mels": 40, "nOut": 8},
        plugins={"loss/bad.py": CLAMPED},
        truths=(Truth(("grad_nonfinite",), ("loss",), (marked("sqrt"),), (CODE,), bit_equal=True),),
        status=3,
    ),
)
