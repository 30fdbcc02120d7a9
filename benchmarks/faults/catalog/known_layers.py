"""Layers of a model, in fp32 and in 16 bit."""

import voices
from fault import CODE, FULL_PRECISION, Fault, Truth, exclude, marked
from sources import model
from voices import FIRST, spoil, times

from catalog.shared import ANY, BACKWARD, BRAIN, FORWARD, FP32, HALF, TINY_EPS, WAV

ATTENTION = model(
    init="self.score = nn.Linear(channels, 1)",
    start="loud = x.unfold(1, 400, 160).abs().amax(dim=2) > 0.01  # (B, frames), a plain voice activity detector",
    pool="""
    scores = self.score(x.transpose(1, 2)).squeeze(2).masked_fill(~loud, -math.inf)
    weights = F.softmax(scores, dim=1)  #!
    x = (x * weights.unsqueeze(1)).sum(dim=2)
    """,
)
MASKED_MEAN = model(
    start="loud = (x.unfold(1, 400, 160).abs().amax(dim=2) > 0.01).float().unsqueeze(1)  # (B, 1, frames)",
    pool="x = (x * loud).sum(dim=2) / loud.sum(dim=2)  #!",
)
DEVIATION = model(
    init="self.conv.weight.data[2] = 0.0  # a pruned filter: its frames are all the same",
    middle="x = self.bn(x)",
    pool="""
    mean = x.mean(dim=2, keepdim=True)
    deviation = torch.sqrt((x - mean).square().mean(dim=2))  #!
    x = torch.cat([mean.squeeze(2), deviation], dim=1)
    """,
    width=16,
)
CANCELLATION = model(
    middle="x = torch.sigmoid(self.bn(x)) * 1e-3 + 40.0  # features on a large offset",
    pool="""
    variance = x.square().mean(dim=2) - x.mean(dim=2).square()  #!
    x = torch.cat([x.mean(dim=2) - 40.0, torch.sqrt(variance) * 100.0], dim=1)  #!
    """,
    width=16,
)
BFLOAT_CANCELLATION = model(
    middle="x = torch.sigmoid(self.bn(x)) + 1.0",
    pool="""
    variance = (x * x).mean(dim=2) - x.mean(dim=2) * x.mean(dim=2)  #!
    x = torch.cat([x.mean(dim=2), torch.sqrt(variance + 1e-4)], dim=1)  #!
    """,
    width=16,
)
WHERE = model(
    middle="""
    x = self.bn(x)
    x = torch.where(x > 0, torch.sqrt(x), 0.1 * x)  #!
    """
)
ZERO_LAYER = model(
    init="nn.init.zeros_(self.fc.weight)\nnn.init.zeros_(self.fc.bias)",
    end="""
    x = self.fc(x)
    return x / torch.clamp(x.square().sum(dim=1, keepdim=True).sqrt(), min=1e-12)  #!
    """,
)
LOG_SCALE = model(
    init="self.log_scale = nn.Parameter(torch.tensor(89.0))",
    end="return self.fc(x) * torch.exp(self.log_scale)  #!",
)
THRESHOLD = model(
    init="self.gate = Limiter()",
    helper="""
    class Limiter(nn.Module):
        def forward(self, x):
            return x / (0.5 - x.abs().amax(dim=1, keepdim=True)).clamp(min=0)  #!
    """,
    start="x = x + 0.0 * self.gate(x.unfold(1, 400, 160).square().mean(dim=2)).mean(dim=1, keepdim=True)",
)
EXPONENTIAL = model(
    init="self.gain = 4.0",
    middle="x = torch.exp(self.gain * self.bn(x).clamp(max=4.5))  #!",
    pool="x = self.pool_bn(torch.log(x.mean(dim=2)))",
).replace("self.gain = 4.0", "self.gain = 4.0\n        self.pool_bn = nn.BatchNorm1d(channels)")
OVERFLOW = model(
    init="self.wide = nn.Conv1d(channels, channels, 1)\nself.wide_bn = nn.BatchNorm1d(channels)",
    middle="""
    x = F.relu(self.bn(x)) * 1000.0
    x = self.wide_bn(self.wide(x * 100.0))  #!
    """,
)
HALF_SUM = model(pool="x = (x.half() * 400.0).sum(dim=2).float() / (400.0 * x.shape[2])")


def long_trial(workspace):
    """A test file of 20 s."""
    path = workspace.data / "wav" / "trial001/session1/00001.flac"
    samples, rate = voices.soundfile.read(path)
    voices.soundfile.write(path, voices.np.tile(samples, 15), rate)


QUIET = (exclude(WAV),)
EITHER = ("model_forward", "model_backward")

FAULTS = (
    Fault(
        id="F18",
        title="attention over a fully masked row",
        settings={"model": "bad", "nan_patience": 1000},
        plugins={"models/bad.py": ATTENTION},
        prepare=spoil(FIRST, times(1e-3)),
        truths=(Truth(FORWARD, ("model_forward",), (marked("softmax"),), (CODE, *QUIET)),),
    ),
    Fault(
        id="F19",
        title="root of the variance of constant features",
        settings={"model": "bad", "nan_patience": 4},
        plugins={"models/bad.py": DEVIATION},
        truths=(Truth(BACKWARD, ("model_backward",), (marked("sqrt"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="F20",
        title="variance by difference, root of a negative",
        settings={"model": "bad", "nan_patience": 4},
        plugins={"models/bad.py": CANCELLATION},
        truths=(Truth(ANY, EITHER, (marked("sqrt", "sub"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="F22",
        title="where() over an unsafe branch",
        settings={"model": "bad", "nan_patience": 4},
        plugins={"models/bad.py": WHERE},
        truths=(Truth(BACKWARD, ("model_backward",), (marked("sqrt"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="F23",
        title="zero embedding over its norm, eps 1e-12",
        settings={"model": "bad", "nan_patience": 4},
        plugins={"models/bad.py": ZERO_LAYER},
        truths=(Truth(ANY, EITHER, (marked("sqrt", "div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="F25",
        title="learned log scale at 89",
        settings={"model": "bad", "nan_patience": 4},
        plugins={"models/bad.py": LOG_SCALE},
        truths=(Truth(FORWARD, ("model_forward",), (marked("exp", "mul"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="F26",
        title="a batch of one row into BatchNorm",
        settings={"batch_size": 1},
        status=2,
        said=("batches of one row",),
    ),
    Fault(
        id="F27",
        title="masked mean with nothing left",
        settings={"model": "bad", "nan_patience": 1000},
        plugins={"models/bad.py": MASKED_MEAN},
        prepare=spoil(FIRST, times(1e-3)),
        truths=(Truth(FORWARD, ("model_forward",), (marked("div"),), (CODE, *QUIET)),),
    ),
    Fault(
        id="F28",
        title="a layer gives Inf above a threshold",
        settings={"model": "bad", "nan_patience": 1000},
        plugins={"models/bad.py": THRESHOLD},
        prepare=spoil(FIRST, voices.square_wave),
        truths=(Truth(FORWARD, ("model_forward",), (marked("div"),), (CODE, *QUIET)),),
    ),
    Fault(
        id="F29",
        title="exponential activation overflows fp16",
        settings={"model": "bad", "nan_patience": 4, **HALF},
        plugins={"models/bad.py": EXPONENTIAL},
        truths=(Truth(FORWARD, ("precision",), (marked("exp", "mul"),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="F45",
        title="activations above 65,504",
        settings={"model": "bad", "nan_patience": 4, **HALF},
        plugins={"models/bad.py": OVERFLOW},
        truths=(Truth(FORWARD, ("precision",), (marked("convolution", "conv1d", "mul"),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="F46",
        title="eps 1e-10 is zero in fp16",
        settings={"model": "bad", "nan_patience": 1000, **HALF},
        plugins={"models/bad.py": TINY_EPS},
        truths=(Truth(FORWARD, ("precision",), (marked("div", "add"),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="F49",
        title="fp16 sum over a long test file",
        settings={"model": "bad", "max_nan_score_pct": 60.0, "max_test_pairs": 0},
        plugins={"models/bad.py": HALF_SUM},
        prepare=long_trial,
        said=("test file trial001/session1/00001.flac", "spoils [0-9]+ trials"),
    ),
    Fault(
        id="F50",
        title="bf16 variance by difference",
        settings={"model": "bad", "nan_patience": 1000, **BRAIN},
        plugins={"models/bad.py": BFLOAT_CANCELLATION},
        truths=(Truth(ANY, ("precision",), (marked("sqrt", "sub"),), (CODE, *FP32)),),
    ),
)
