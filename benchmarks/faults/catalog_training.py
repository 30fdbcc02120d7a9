"""Faults of optimizer, schedule, scaler, state, processes and environment: F37 to F43, F47, F48, F51 to F59."""

import shutil

import voices
from catalog_loss import CLAMPED, below
from fault import CODE, RESTORE, Fault, Place, Stage, Truth, exclude, put
from sources import model
from voices import FIRST, SAMPLE, at, spoil
from workspace import ECAPA

HALF = {"mixedprec": True, "amp_dtype": "float16"}
SGD = {"optimizer": "sgd", "scheduler": "steplr", "trainfunc": "softmax", "nan_patience": 4, "max_epoch": 30}
SGD |= {"test_interval": 30, "momentum": 0.9, "grad_clip": 0.0}
STOPPED = ("loss_nonfinite", "grad_nonfinite", "grad_norm_overflow", "state_nonfinite")
PLAIN = model(middle="x = F.relu(x)")  # without BatchNorm, which would absorb any weight
WAV = f"wav/{FIRST}.wav"

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
OVERFLOWS_ONCE = model(end="return self.fc(x * 20.0)")
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


def optimizer_fault(id, title, keys, fixes, settings, reasons=STOPPED, **more) -> Fault:
    """A fault of a configuration key of the optimizer: it ends the run, for no state is left to train on."""
    truth = Truth(reasons, ("optimizer",), (Place(keys=keys),), fixes)
    return Fault(id, title, (truth,), settings, status=3, **more)


def edit_last(change):
    """A preparation that changes the run's newest full state."""

    def prepare(workspace):
        import torch

        path = workspace.run / "model" / "last.model"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return prepare


def poison_weight(state):
    """One NaN in a weight."""
    state["model_state_dict"]["__S__.conv.weight"].view(-1)[0] = float("nan")


def poison_moment(state):
    """One NaN in a moment of Adam."""
    state["optimizer_state_dict"]["state"][0]["exp_avg"].view(-1)[0] = float("nan")


def no_scale(state):
    """A loss scale of 0."""
    state["scaler_state_dict"]["scale"] = 0.0


def start_over(workspace):
    """Keep the newest state as an initial model, and forget the run."""
    (workspace.run / "model" / "last.model").rename(workspace.folder / "initial.model")
    shutil.rmtree(workspace.run)


def scale_found(workspace):
    """The loss scale must have been lowered: the run did meet the overflow that must not be reported."""
    import torch

    scale = torch.load(workspace.run / "model" / "last.model", weights_only=True)["scaler_state_dict"]["scale"]
    return None if scale < 2.0**16 else f"no overflow happened: the loss scale is {scale}"


STORM = [f"train00{speaker}/session{number % 4}/{number:05d}" for speaker in range(6) for number in (1, 4)]
STORM_FILES = tuple(f"wav/{name}.wav" for name in STORM)
WEIGHT = ("__S__.conv.weight", "S.conv.weight", "conv.weight")
MOMENT = (*WEIGHT, "optimizer.0.exp_avg", "__S__.conv.weight.exp_avg", "exp_avg.__S__.conv.weight")
BUFFER = ("__S__.watch.running_var", "__S__.watch.running_mean")
LOWER_LR = (put("lr", below(0.5)),)
OPTIMIZER_FAULTS = (
    optimizer_fault(
        *("F37", "SGD at lr 50, plain softmax", ("lr",), LOWER_LR, {**SGD, "model": "Plain", "lr": 50.0}),
        plugins={"models/Plain.py": PLAIN},
    ),
    optimizer_fault(
        *("F37b", "SGD at lr 1e3", ("lr",), LOWER_LR, {**SGD, "model": "Plain", "lr": 1e3}),
        plugins={"models/Plain.py": PLAIN},
    ),
    optimizer_fault(
        *("F37c", "SGD at lr 1e6", ("lr",), LOWER_LR, {**SGD, "model": "Plain", "lr": 1e6}),
        plugins={"models/Plain.py": PLAIN},
    ),
    Fault("F38", "lr 1e6 with BatchNorm and AAM: diverges, finite", (), {"optimizer": "sgd", "lr": 1e6}),
    optimizer_fault(
        *("F39", "lr x weight decay above 2", ("weight_decay",), (put("weight_decay", lambda v: 0 <= v <= 15),)),
        {**SGD, "model": "Plain", "lr": 0.1, "weight_decay": 50.0, "momentum": 0.0},
        plugins={"models/Plain.py": PLAIN},
    ),
    optimizer_fault(
        *("F40", "momentum 1.2", ("momentum",), (put("momentum", lambda v: 0 <= v < 1),)),
        {**SGD, "model": "Plain", "lr": 0.01, "momentum": 1.2, "max_epoch": 60, "test_interval": 60},
        plugins={"models/Plain.py": PLAIN},
    ),
    Fault(
        *("F41", "the schedule returns NaN"),
        (
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (Place(code=True), Place(keys=("lr", "scheduler"))),
                (CODE, RESTORE, put("scheduler", lambda v: v != "bad")),
            ),
        ),
        {"scheduler": "bad", "nan_patience": 4},
        {"scheduler/bad.py": NAN_SCHEDULE},
        status=3,
    ),
    optimizer_fault(
        *(
            "F42",
            "Adam eps 0 and a gradient of exactly zero",
            ("eps", "__S__.language"),
            (put("eps", lambda v: v > 0),),
        ),
        {"model": "bad", "eps": 0.0, "nan_patience": 4},
        ("state_nonfinite",),
        plugins={"models/bad.py": DEAD_PARAMETER},
    ),
)
STATE_FAULTS = (
    Fault(
        *("F43", "NaN in a moment of Adam"),
        (Truth(("state_nonfinite",), ("state",), (Place(parameters=MOMENT), Place(code=True)), (RESTORE, CODE)),),
        {"optimizer": "bad", "nan_patience": 4},
        {"optimizer/bad.py": POISON_MOMENT},
        status=3,
    ),
    Fault(
        *("F43b", "resume from a NaN moment: refused", (), {"max_epoch": 1}),
        more=(Stage(edit_last(poison_moment), {"max_epoch": 2}, 2),),
        said=("tensors are not finite.*optimizer.0.exp_avg",),
    ),
    Fault(
        *("F51", "initial model with a NaN weight: refused", (), {"max_epoch": 1}),
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
        *("F52", "an exponent bit of a weight flips"),
        (
            Truth(
                ("loss_nonfinite", "state_nonfinite", "grad_nonfinite"),
                ("state",),
                (Place(parameters=WEIGHT),),
                (RESTORE,),
            ),
        ),
        {"optimizer": "bad", "nan_patience": 4},
        {"optimizer/bad.py": FLIP_BIT},
        status=3,
    ),
    Fault(
        *("F53", "a BatchNorm statistic overflows in the forward pass"),
        (
            Truth(
                ("state_nonfinite",),
                ("state", "model_forward"),
                (Place(parameters=BUFFER), Place(code=True)),
                (CODE, exclude(WAV)),
            ),
        ),
        {"model": "bad", "nan_patience": 1000},
        {"models/bad.py": WATCHER},
        spoil(FIRST, voices.square_wave),
    ),
    Fault(
        *("F54", "resume with loss scale 0: refused", (), {**HALF, "max_epoch": 1}),
        more=(Stage(edit_last(no_scale), {"max_epoch": 2}, 2),),
        said=("loss scale is 0.0",),
    ),
    Fault(
        "F47",
        "loss scale 2^16 on a fresh net: searched, no dump",
        (),
        {**HALF, "model": "bad"},
        {"models/bad.py": OVERFLOWS_ONCE},
        check=scale_found,
    ),
    Fault(
        *("F48", "a bad file in nearly every batch, fp16"),
        (
            Truth(
                ("batch_nonfinite",),
                ("input",),
                (Place(among=STORM_FILES, sample=SAMPLE),),
                (exclude(*STORM_FILES),),
            ),
        ),
        {**HALF, "max_epoch": 4, "test_interval": 4, "nan_patience": 1000},
        prepare=voices.together(*(spoil(name, at(SAMPLE, float("nan"))) for name in STORM)),
    ),
)
RANKS = {"batch_size": 3}
OTHER_FAULTS = (
    Fault(
        *("F55", "NaN file on rank 1"),
        (
            Truth(
                ("batch_nonfinite",),
                ("input", "distributed"),
                (Place(files=(WAV,), sample=SAMPLE, rank=1),),
                (exclude(WAV),),
            ),
        ),
        {**RANKS, "max_epoch": 1},
        prepare=spoil(FIRST, at(SAMPLE, float("nan"))),
        processes=2,
    ),
    Fault(
        *("F55b", "finite losses, NaN gradient on rank 1"),
        (
            Truth(
                ("grad_nonfinite",),
                ("model_backward", "distributed"),
                (Place(code=True, ops=("sqrt",), rank=1),),
                (CODE, exclude(WAV)),
            ),
        ),
        {**RANKS, "model": "bad"},
        {"models/bad.py": FLAT},
        spoil(FIRST, voices.silence),
        processes=2,
    ),
    Fault(
        *("F56", "loss NaN on one rank: all leave the step out together"),
        (Truth(("loss_nonfinite",), ("input", "distributed"), (Place(files=(WAV,)),), (exclude(WAV),)),),
        {**RANKS, **ECAPA},
        prepare=spoil(FIRST, voices.times(1e18)),
        processes=2,
        seconds=60,
    ),
    Fault(
        *("F57", "weights of rank 1 drift"),
        settings={**RANKS, "model": "bad"},
        plugins={"models/bad.py": DRIFT},
        processes=2,
        said=("(?i)(rank|process).*(differ|diverge)",),
    ),
    Fault(
        *("F58", "an activation is Inf once"),
        (Truth(("loss_nonfinite",), ("environment",)),),
        {"model": "bad"},
        {"models/bad.py": ONCE},
    ),
    Fault(
        *("F59", "two threads: the replay uses as many"),
        (Truth(("grad_nonfinite",), ("loss",), (Place(code=True, ops=("sqrt",)),), (CODE,), bit_equal=True),),
        {"trainfunc": "bad", "threads": 2, "model": "ECAPA_TDNN", "channels": 32, "n_mels": 40, "nOut": 8},
        {"loss/bad.py": CLAMPED},
    ),
)
FAULTS = (*OPTIMIZER_FAULTS, *STATE_FAULTS, *OTHER_FAULTS)
