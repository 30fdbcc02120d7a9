"""Layers written by hand: norms, quantisers, checkpointed and scripted parts."""

from fault import CODE, MARKER, Fault, Place, Truth, exclude, marked
from sources import model
from voices import FIRST, spoil

from catalog.shared import BACKWARD, DEAD, FILTERS, FORWARD, LAYER, RMS_NORM, SLOPE, WAV, gap

LAYERS = '''"""Layers that several models share."""

import torch
from torch import nn


class WeightNormLinear(nn.Module):
    """A linear layer whose weight is a direction and a length (Salimans and Kingma 2016)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(outputs, inputs) * 0.05)
        self.length = nn.Parameter(torch.ones(outputs, 1))

    def forward(self, x):
        weight = self.length * self.direction / self.direction.norm(dim=1, keepdim=True)  # FAULT
        return x @ weight.t()
'''
WEIGHT_NORM = model(
    init="""
    from models.unseen_layers import WeightNormLinear
    self.residual = WeightNormLinear(channels, channels)
    nn.init.zeros_(self.residual.direction)  # the block starts as the identity
    """,
    pool="x = x.mean(dim=2)\nx = x + self.residual(x)",
)
GROUP_OF_ONE = model(
    helper='''
    class GroupNorm(nn.Module):
        """Normalise groups of channels, written out."""

        def __init__(self, groups, channels):
            super().__init__()
            self.groups = groups
            self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

        def forward(self, x):
            shape = x.shape
            x = x.reshape(shape[0], self.groups, -1)
            x = x - x.mean(dim=-1, keepdim=True)
            x = x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()  #!
            return x.reshape(shape) * self.gamma + self.beta
    ''',
    init="self.squeeze = nn.Sequential(nn.Linear(channels, channels), GroupNorm(channels, channels), nn.Sigmoid())",
    pool="""
    gate = self.squeeze(x.mean(dim=2))
    x = (x * gate.unsqueeze(2)).mean(dim=2)
    """,
)
QUANTISER = model(
    helper='''
    class Quantise(torch.autograd.Function):
        """Steps of an eighth; the gradient passes with the sign of the input."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.round(x * 8) / 8

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * x / x.abs()  #!
    ''',
    middle="""
    x = F.dropout(self.bn(x), 0.2, self.training)
    x = Quantise.apply(x)  #!
    """,
)
COMPRESSION = model(
    middle="""
    x = F.dropout(self.bn(x), 0.2, self.training)
    x = x.sign() * x.abs() ** 0.3  #!
    """
)
CHECKPOINTED = model(
    helper="from torch.utils.checkpoint import checkpoint",
    init="self.wide = nn.Conv1d(channels, 2 * channels, 1)",
    middle="""
    x = F.relu(self.bn(x))
    x = checkpoint(self.modulus, x, use_reentrant=False)
    """,
).replace(
    "    def forward(self, x):",
    f"""    def modulus(self, x):
        real, imaginary = F.dropout(self.wide(x), 0.3, self.training).chunk(2, dim=1)
        return torch.hypot(real, imaginary)  {MARKER}

    def forward(self, x):""",
)
SCRIPTED = model(
    helper='''
    @torch.jit.script
    def log_mean(x: torch.Tensor) -> torch.Tensor:
        """Logarithm of the mean over time."""
        mean = x.mean(dim=2)
        return mean.log()  #!
    ''',
    init=DEAD,
    pool="x = log_mean(x)  #!",
)
FLUX = model(
    init="self.conv = nn.Conv1d(1, channels, 400, stride=160, bias=False)",
    middle="""
    change = 1.0 - F.cosine_similarity(x[:, :, 1:], x[:, :, :-1], dim=1, eps=0.0)  #!
    x = F.relu(self.bn(x))[:, :, 1:] * (1.0 + change.unsqueeze(1))
    """,
)

FAULTS = (
    Fault(
        id="H11",
        title="weight norm of a zero direction, in a shared file",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": WEIGHT_NORM, "models/unseen_layers.py": LAYERS},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H12",
        title="RMS norm without eps, a drop-out of zeros",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": RMS_NORM},
        prepare=spoil(FIRST, gap),
        truths=(Truth(FORWARD, FILTERS, (marked("rsqrt", "mul"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="H13",
        title="group norm by hand, groups of one",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": GROUP_OF_ONE},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H14",
        title="backward() of a custom function divides by 0",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": QUANTISER},
        truths=(Truth(BACKWARD, SLOPE, (marked(),), ()),),
        status=3,
    ),
    Fault(
        id="H15",
        title="signed power of dropped units",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": COMPRESSION},
        truths=(Truth(BACKWARD, SLOPE, (marked("pow", "abs", "mul", "sign"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H16",
        title="hypot(0, 0) after dropout in a checkpointed block",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": CHECKPOINTED},
        truths=(Truth(BACKWARD, SLOPE, (marked("hypot"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H17",
        title="log of 0 in a scripted function",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": SCRIPTED},
        truths=(Truth(FORWARD, LAYER, (marked(),), ()),),
        status=3,
    ),
    Fault(
        id="H18",
        title="cosine of successive frames, eps 0",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": FLUX},
        prepare=spoil(FIRST, gap),
        truths=(Truth(FORWARD, FILTERS, (marked(), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
)
