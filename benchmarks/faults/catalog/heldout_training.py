"""Optimizer, schedule, state, accumulation and processes."""

import voices
from fault import CODE, RESTORE, Fault, Place, Stage, Truth, exclude, marked, put
from sources import model, optimizer, schedule
from voices import FIRST, spoil

from catalog.shared import (
    BACKWARD,
    DEAD,
    FORWARD,
    PLAIN,
    RANKS,
    RMS_NORM,
    SGD,
    STOPPED,
    WAV,
    edit_last,
    gap,
    start_over,
)

ADAM_BY_HAND = optimizer(
    "Adam",
    "Adam as in the paper, without its last line.",
    """
    def update(self, p, grad, state, group):
        if not state:
            state["n"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
        state["n"] += 1
        state["m"].lerp_(grad, 1 - group["beta1"])
        state["v"].lerp_(grad * grad, 1 - group["beta2"])
        m = state["m"] / (1 - group["beta1"] ** state["n"])
        v = state["v"] / (1 - group["beta2"] ** state["n"])
        p -= group["lr"] * m / v.sqrt()  #!
    """,
)
STANDARDISED = optimizer(
    "Standardised",
    "SGD with gradients of mean 0 and deviation 1.",
    """
    def update(self, p, grad, state, group):
        grad = (grad - grad.mean()) / (grad.std() + 1e-8)  #!
        p.add_(grad, alpha=-0.1 * group["lr"])
    """,
)
WRONG_SIGN = optimizer(
    "Decoupled",
    "SGD with decoupled weight decay.",
    """
    def update(self, p, grad, state, group):
        p.mul_(1.0 + group["lr"] * group["weight_decay"])  #!
        p.sub_(group["lr"] * grad)
    """,
)
LAMB = optimizer(
    "Lamb",
    "Adam with a trust ratio for each tensor (You et al. 2020), without its guard.",
    """
    def update(self, p, grad, state, group):
        if not state:
            state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
        state["m"].mul_(0.9).add_(grad, alpha=0.1)
        state["v"].mul_(0.99).addcmul_(grad, grad, value=0.01)
        change = state["m"] / (state["v"].sqrt() + 1e-6)
        ratio = p.norm() / change.norm()  #!
        p.add_(ratio * change, alpha=-0.1 * group["lr"])  #!
    """,
)
LOOKAHEAD = optimizer(
    "Lookahead",
    "SGD whose slow weights follow every second step (Zhang et al. 2019); a share of 1/0.25, not 0.25.",
    """
    def update(self, p, grad, state, group):
        if not state:
            state["n"], state["slow"] = 0, p.clone()
        p.sub_(group["lr"] * grad)
        state["n"] += 1
        if state["n"] % 2 == 0:
            state["slow"] += (p - state["slow"]) / 0.25  #!
            p.copy_(state["slow"])
    """,
)
ADAGRAD = '''"""Adagrad."""

import torch


def Optimizer(parameters, lr=0.001, **kwargs):
    return torch.optim.Adagrad(parameters, lr=lr, eps=0)  # FAULT
'''


POLE = schedule(
    "A hyperbolic end: the rate rises as the last steps come near.",
    ", hyper_steps=9",
    """
    left = np.asarray(hyper_steps - step, dtype=np.float32)
    with np.errstate(divide="ignore"):
        return float(0.1 * hyper_steps / left) if step <= hyper_steps else 0.1  #!
    """,
)
FINDER = schedule(
    "A learning rate finder: ten times the rate every other step.",
    ", lr_end=1e16",
    """
    return min(10.0 ** (step / 2), lr_end / lr)  #!
    """,
)
WARM_UP = schedule(
    "Noam: linear warm-up, then the inverse root.",
    ", warmup_steps=0",
    """
    step, warm = np.float64(step), np.float64(warmup_steps)
    with np.errstate(all="ignore"):
        return float(min(step / warm, np.sqrt(warm / step)))  #!
    """,
)
GAIN = model(init="self.gain = nn.Parameter(torch.ones(1))", end="return self.fc(x) * self.gain")
DEAD_CHANNEL = model(init=DEAD)
UNUSED = model(init="self.language = nn.Parameter(torch.ones(8))", pool="x = x.mean(dim=2) + 0.0 * self.language")
DEAD_NAMES = tuple(f"__S__.{name}" for name in ("conv.weight", "conv.bias", "bn.weight", "bn.bias"))
FROZEN = model(
    init="self.freeze = freeze",
    start="if self.freeze:\n    self.bn.eval()  # fine-tuning with the statistics of the first training",
    middle="x = F.relu(self.bn(x))  #!",
).replace("channels=8, **kwargs", "channels=8, freeze=False, **kwargs")
LOUDNESS = model(
    start="""
    energy = (x - x.mean(dim=1, keepdim=True)).pow(2).sum(dim=1)
    """,
    init="self.conv = nn.Conv1d(1, channels, 400, stride=160, bias=False)",
    middle="""
    loudness = x.square().sum(dim=(1, 2)).pow(0.5)  #!
    x = F.relu(self.bn(x)) + 0.01 * loudness[:, None, None]
    """,
)
HOOK = model(
    init=f"""
    {DEAD}
    for p in (self.conv.weight, self.fc.weight):
        p.register_hook(lambda grad: grad / grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.dim() - 1)))  #!
    """
)
BROKEN_RANK = model(
    init="self.step = 0",
    end="""
    x = self.fc(x)
    self.step += self.training
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1 and self.step == 5:
        x = x / (x - x)  #!
    return x
    """,
)


def negative_variance(state):
    """A running variance below 0, as an average of checkpoints by hand can give."""
    state["model_state_dict"]["__S__.bn.running_var"][2] = -0.5


def poison_class(state):
    """NaN in the centre of one speaker."""
    state["model_state_dict"]["__L__.weight"][4] = float("nan")


PLAIN_SGD = {key: value for key, value in SGD.items() if key != "momentum"} | {"model": "Plain"}
OTHER_OPTIMIZER = put("optimizer", lambda v: v != "unseen")
OTHER_SCHEDULE = put("scheduler", lambda v: v != "unseen")

FAULTS = (
    Fault(
        id="H41",
        title="Adam by hand without eps, a dead channel",
        settings={"nan_patience": 4, "model": "unseen", "optimizer": "unseen"},
        plugins={"models/unseen.py": DEAD_CHANNEL, "optimizer/unseen.py": ADAM_BY_HAND},
        truths=(
            Truth(
                ("state_nonfinite",), ("optimizer",), (marked(), Place(parameters=DEAD_NAMES)), (CODE, OTHER_OPTIMIZER)
            ),
        ),
        status=3,
    ),
    Fault(
        id="H42",
        title="gradients standardised, one of a single number",
        settings={"nan_patience": 4, "model": "unseen", "optimizer": "unseen"},
        plugins={"models/unseen.py": GAIN, "optimizer/unseen.py": STANDARDISED},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(parameters=("__S__.gain",))),
                (CODE, OTHER_OPTIMIZER),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H43",
        title="weight decay with the wrong sign",
        settings={"nan_patience": 4, **PLAIN_SGD, "optimizer": "unseen", "lr": 0.1, "weight_decay": 30.0},
        plugins={"models/Plain.py": PLAIN, "optimizer/unseen.py": WRONG_SIGN},
        truths=(
            Truth(
                STOPPED,
                ("optimizer",),
                (marked(), Place(keys=("weight_decay",))),
                (CODE, OTHER_OPTIMIZER, put("weight_decay", lambda v: -1 <= v < 2)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H44",
        title="LAMB: 0/0 of the trust ratio, an unused weight",
        settings={"nan_patience": 4, "model": "unseen", "optimizer": "unseen"},
        plugins={"models/unseen.py": UNUSED, "optimizer/unseen.py": LAMB},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(parameters=("__S__.language",))),
                (CODE, OTHER_OPTIMIZER),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H45",
        title="Adagrad with eps 0",
        settings={"nan_patience": 4, "model": "unseen", "optimizer": "unseen"},
        plugins={"models/unseen.py": UNUSED, "optimizer/unseen.py": ADAGRAD},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(keys=("eps", "__S__.language"))),
                (CODE, OTHER_OPTIMIZER),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H46",
        title="a schedule with a pole",
        settings={"nan_patience": 4, "scheduler": "unseen"},
        plugins={"scheduler/unseen.py": POLE},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(keys=("lr", "scheduler", "hyper_steps"))),
                (CODE, RESTORE, OTHER_SCHEDULE, put("hyper_steps", lambda v: v > 16)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H47",
        title="a learning rate finder that goes on",
        settings={"nan_patience": 4, **SGD, "model": "Plain", "scheduler": "unseen", "lr": 1e-4},
        plugins={"models/Plain.py": PLAIN, "scheduler/unseen.py": FINDER},
        truths=(
            Truth(
                STOPPED,
                ("optimizer",),
                (marked(), Place(keys=("lr", "scheduler", "lr_end"))),
                (CODE, OTHER_SCHEDULE, put("lr_end", lambda v: v <= 0.5), put("lr", lambda v: 0 < v < 1e-12)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H48",
        title="warm-up over 0 steps: 0/0 at the first",
        settings={"nan_patience": 4, "scheduler": "unseen"},
        plugins={"scheduler/unseen.py": WARM_UP},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(keys=("lr", "scheduler", "warmup_steps"))),
                (CODE, OTHER_SCHEDULE, put("warmup_steps", lambda v: v > 0)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H49",
        title="frozen BatchNorm with a negative variance",
        settings={"model": "unseen", "max_epoch": 1, "nan_patience": 4},
        plugins={"models/unseen.py": FROZEN},
        more=(
            Stage(
                voices.together(edit_last(negative_variance), start_over),
                {"initial_model": "@initial.model", "freeze": True},
                3,
            ),
        ),
        truths=(
            Truth(
                FORWARD,
                ("state", "model_forward"),
                (Place(parameters=("__S__.bn.running_var",)), Place(code=True, modules=("__S__.bn",))),
                (RESTORE, CODE),
            ),
        ),
    ),
    Fault(
        id="H50",
        title="initial model with a NaN class centre: refused",
        settings={"max_epoch": 1},
        more=(Stage(voices.together(edit_last(poison_class), start_over), {"initial_model": "@initial.model"}, 2),),
        said=("tensors are not finite.*__L__.weight",),
    ),
    Fault(
        id="H51",
        title="one bad batch of four that are accumulated",
        settings={"model": "unseen", "gradient_accumulation_steps": 4, "nan_patience": 1000},
        plugins={"models/unseen.py": LOUDNESS},
        prepare=spoil(FIRST, voices.silence),
        truths=(
            Truth(
                BACKWARD,
                ("model_backward",),
                (marked("pow", "sqrt"),),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="H52",
        title="a gradient hook divides by a norm of 0",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": HOOK},
        truths=(
            Truth(
                BACKWARD,
                ("model_backward",),
                (marked(), Place(parameters=("__S__.conv.weight", "conv.weight"))),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H53",
        title="RMS norm of a drop-out, on one of two ranks",
        settings={"model": "unseen", **RANKS, "nan_patience": 1000},
        plugins={"models/unseen.py": RMS_NORM},
        prepare=spoil(FIRST, gap),
        processes=2,
        truths=(
            Truth(
                FORWARD,
                ("model_forward", "distributed", "input", "frontend"),
                (Place(code=True, named_rank=True), Place(files=(WAV,), named_rank=True)),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="H54",
        title="rank 1 alone divides by zero, once",
        settings={"model": "unseen", **RANKS},
        plugins={"models/unseen.py": BROKEN_RANK},
        processes=2,
        truths=(
            Truth(
                FORWARD,
                ("model_forward", "distributed", "environment"),
                (Place(code=True, rank=1, ops=("div",)), Place(rank=1)),
            ),
        ),
        status=3,  # a refused step puts the counter back, so that its number comes again
    ),
    Fault(
        id="H65",
        title="cyclic rate, its peak far too high",
        settings={"nan_patience": 4, **SGD, "model": "Plain", "scheduler": "triangular2", "cycle_epochs": 4, "lr": 3e3},
        plugins={"models/Plain.py": PLAIN},
        truths=(Truth(STOPPED, ("optimizer",), (Place(keys=("lr",)),), (put("lr", lambda v: 0 < v <= 1),)),),
        status=3,
    ),
    Fault(
        id="H66",
        title="Lookahead that goes four times as far",
        settings={"nan_patience": 4, **PLAIN_SGD, "optimizer": "unseen", "lr": 2.0},
        plugins={"models/Plain.py": PLAIN, "optimizer/unseen.py": LOOKAHEAD},
        truths=(
            Truth(
                STOPPED,
                ("optimizer",),
                (marked(), Place(keys=("optimizer", "lr"))),
                (CODE, OTHER_OPTIMIZER, put("lr", lambda v: 0 < v <= 0.5)),
            ),
        ),
        status=3,
    ),
)
