"""Held-out faults of optimizer, schedule, state, accumulation and processes: H41 to H54, H65, H66."""

import voices
from catalog_heldout_features import BACKWARD, DEAD, FORWARD, RMS_NORM, UNSEEN, WAV, gap
from catalog_training import PLAIN, SGD, STOPPED, edit_last, start_over
from fault import CODE, RESTORE, Fault, Place, Stage, Truth, exclude, put
from sources import model
from voices import FIRST, spoil

OPTIMIZER = '''"""{what}"""

import torch


class {name}(torch.optim.Optimizer):
    def __init__(self, parameters, lr, weight_decay=0.0, beta1=0.9, beta2=0.99):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)


{update}

def Optimizer(parameters, lr=0.001, weight_decay=0.0, **kwargs):
    return {name}(parameters, lr, weight_decay)
'''


def optimizer(name: str, what: str, update: str) -> str:
    """Source of an optimizer plug-in; '#!' marks the fault."""
    from sources import _block

    return OPTIMIZER.format(name=name, what=what, update=_block(update, 4) + "\n")


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
SCHEDULE = '''"""{what}"""

import numpy as np
import torch


def Scheduler(optimizer, lr=0.001{keys}, **kwargs):
    def factor(step):
{body}

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "iteration"
'''


def schedule(what: str, keys: str, body: str) -> str:
    """Source of a scheduler plug-in; '#!' marks the fault."""
    from sources import _block

    return SCHEDULE.format(what=what, keys=keys, body=_block(body))


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


def of_update(id, title, places, fixes, plugins, settings, reasons=("state_nonfinite",), status=3, **more) -> Fault:
    """A fault of the optimizer or the schedule."""
    truth = Truth(reasons, more.pop("causes", ("optimizer",)), places, fixes)
    return Fault(id, title, (truth,), {"nan_patience": 4, **settings}, plugins, status=status, **more)


HAND = {"optimizer": "unseen"}
PLAIN_SGD = {key: value for key, value in SGD.items() if key != "momentum"} | {"model": "Plain"}
MARKED = Place(code=True)
OTHER_OPTIMIZER = put("optimizer", lambda v: v != "unseen")
OTHER_SCHEDULE = put("scheduler", lambda v: v != "unseen")
RANKS = {"batch_size": 3}
FAULTS = (
    of_update(
        *("H65", "cyclic rate, its peak far too high", (Place(keys=("lr",)),)),
        (put("lr", lambda v: 0 < v <= 1),),
        {"models/Plain.py": PLAIN},
        {**SGD, "model": "Plain", "scheduler": "triangular2", "cycle_epochs": 4, "lr": 3e3},
        STOPPED,
    ),
    of_update(
        *("H66", "Lookahead that goes four times as far", (MARKED, Place(keys=("optimizer", "lr")))),
        (CODE, OTHER_OPTIMIZER, put("lr", lambda v: 0 < v <= 0.5)),
        {"models/Plain.py": PLAIN, "optimizer/unseen.py": LOOKAHEAD},
        {**PLAIN_SGD, **HAND, "lr": 2.0},
        STOPPED,
    ),
    of_update(
        *("H41", "Adam by hand without eps, a dead channel", (MARKED, Place(parameters=DEAD_NAMES))),
        (CODE, OTHER_OPTIMIZER),
        {"models/unseen.py": DEAD_CHANNEL, "optimizer/unseen.py": ADAM_BY_HAND},
        {**UNSEEN, **HAND},
    ),
    of_update(
        *("H42", "gradients standardised, one of a single number", (MARKED, Place(parameters=("__S__.gain",)))),
        (CODE, OTHER_OPTIMIZER),
        {"models/unseen.py": GAIN, "optimizer/unseen.py": STANDARDISED},
        {**UNSEEN, **HAND},
    ),
    of_update(
        *("H43", "weight decay with the wrong sign", (MARKED, Place(keys=("weight_decay",)))),
        (CODE, OTHER_OPTIMIZER, put("weight_decay", lambda v: -1 <= v < 2)),
        {"models/Plain.py": PLAIN, "optimizer/unseen.py": WRONG_SIGN},
        {**PLAIN_SGD, **HAND, "lr": 0.1, "weight_decay": 30.0},
        STOPPED,
    ),
    of_update(
        *("H44", "LAMB: 0/0 of the trust ratio, an unused weight", (MARKED, Place(parameters=("__S__.language",)))),
        (CODE, OTHER_OPTIMIZER),
        {"models/unseen.py": UNUSED, "optimizer/unseen.py": LAMB},
        {**UNSEEN, **HAND},
    ),
    of_update(
        *("H45", "Adagrad with eps 0", (MARKED, Place(keys=("eps", "__S__.language")))),
        (CODE, OTHER_OPTIMIZER),
        {"models/unseen.py": UNUSED, "optimizer/unseen.py": ADAGRAD},
        {**UNSEEN, **HAND},
    ),
    of_update(
        *("H46", "a schedule with a pole", (MARKED, Place(keys=("lr", "scheduler", "hyper_steps")))),
        (CODE, RESTORE, OTHER_SCHEDULE, put("hyper_steps", lambda v: v > 16)),
        {"scheduler/unseen.py": POLE},
        {"scheduler": "unseen"},
    ),
    of_update(
        *("H47", "a learning rate finder that goes on", (MARKED, Place(keys=("lr", "scheduler", "lr_end")))),
        (CODE, OTHER_SCHEDULE, put("lr_end", lambda v: v <= 0.5), put("lr", lambda v: 0 < v < 1e-12)),
        {"models/Plain.py": PLAIN, "scheduler/unseen.py": FINDER},
        {**SGD, "model": "Plain", "scheduler": "unseen", "lr": 1e-4},
        STOPPED,
    ),
    of_update(
        *("H48", "warm-up over 0 steps: 0/0 at the first", (MARKED, Place(keys=("lr", "scheduler", "warmup_steps")))),
        (CODE, OTHER_SCHEDULE, put("warmup_steps", lambda v: v > 0)),
        {"scheduler/unseen.py": WARM_UP},
        {"scheduler": "unseen"},
    ),
    Fault(
        *("H49", "frozen BatchNorm with a negative variance"),
        (
            Truth(
                FORWARD,
                ("state", "model_forward"),
                (Place(parameters=("__S__.bn.running_var",)), Place(code=True, modules=("__S__.bn",))),
                (RESTORE, CODE),
            ),
        ),
        {**UNSEEN, "max_epoch": 1, "nan_patience": 4},
        {"models/unseen.py": FROZEN},
        more=(
            Stage(
                voices.together(edit_last(negative_variance), start_over),
                {"initial_model": "@initial.model", "freeze": True},
                3,
            ),
        ),
    ),
    Fault(
        *("H50", "initial model with a NaN class centre: refused", (), {"max_epoch": 1}),
        more=(Stage(voices.together(edit_last(poison_class), start_over), {"initial_model": "@initial.model"}, 2),),
        said=("tensors are not finite.*__L__.weight",),
    ),
    Fault(
        *("H51", "one bad batch of four that are accumulated"),
        (
            Truth(
                BACKWARD,
                ("model_backward",),
                (Place(code=True, ops=("pow", "sqrt")),),
                (CODE, exclude(WAV)),
            ),
        ),
        {**UNSEEN, "gradient_accumulation_steps": 4, "nan_patience": 1000},
        {"models/unseen.py": LOUDNESS},
        spoil(FIRST, voices.silence),
    ),
    Fault(
        *("H52", "a gradient hook divides by a norm of 0"),
        (
            Truth(
                BACKWARD,
                ("model_backward",),
                (Place(code=True), Place(parameters=("__S__.conv.weight", "conv.weight"))),
            ),
        ),
        {**UNSEEN, "nan_patience": 4},
        {"models/unseen.py": HOOK},
        status=3,
    ),
    Fault(
        *("H53", "RMS norm of a drop-out, on rank 1"),
        (
            Truth(
                FORWARD,
                ("model_forward", "distributed", "input", "frontend"),
                (Place(code=True, rank=1), Place(files=(WAV,), rank=1)),
                (CODE, exclude(WAV)),
            ),
        ),
        {**UNSEEN, **RANKS, "nan_patience": 1000},
        {"models/unseen.py": RMS_NORM},
        spoil(FIRST, gap),
        processes=2,
    ),
    Fault(
        *("H54", "rank 1 alone divides by zero, once"),
        (
            Truth(
                FORWARD,
                ("model_forward", "distributed", "environment"),
                (Place(code=True, rank=1, ops=("div",)), Place(rank=1)),
            ),
        ),
        {**UNSEEN, **RANKS},
        {"models/unseen.py": BROKEN_RANK},
        processes=2,
    ),
)
