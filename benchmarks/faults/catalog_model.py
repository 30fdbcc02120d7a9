"""Faults of layers and of 16-bit arithmetic in them: F18 to F29, F45, F46, F49, F50."""

import voices
from fault import CODE, FULL_PRECISION, Fault, Place, Truth, exclude, put
from sources import model
from voices import FIRST, spoil, times

WAV = f"wav/{FIRST}.wav"
BAD = {"model": "bad"}
HALF = {"mixedprec": True, "amp_dtype": "float16"}
BRAIN = {"mixedprec": True, "amp_dtype": "bfloat16"}
BACKWARD, FORWARD = ("grad_nonfinite",), ("loss_nonfinite",)


def one_line(id, title, reasons, causes, ops, source, more_fixes=(), every=False, **more) -> Fault:
    """A fault of a marked line of models/bad.py; ``every`` batch has it, or only some."""
    settings = {**BAD, "nan_patience": 4 if every else 1000, **more.pop("settings", {})}
    more |= {"status": 3} if every else {}
    truth = Truth(reasons, causes, (Place(code=True, ops=ops),), (CODE, *more_fixes))
    return Fault(id, title, (truth,), settings, {"models/bad.py": source}, **more)


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
TINY_EPS = model(
    init="self.bn.bias.data[:] = -1.5",
    pool="""
    x = x[:, :, :6]
    x = x / (x.amax(dim=2, keepdim=True) + 1e-10)  #!
    x = x.mean(dim=2)
    """,
)
HALF_SUM = model(pool="x = (x.half() * 400.0).sum(dim=2).float() / (400.0 * x.shape[2])")


def long_trial(workspace):
    """A test file of 20 s."""
    path = workspace.data / "wav" / "trial001/session1/00001.flac"
    samples, rate = voices.soundfile.read(path)
    voices.soundfile.write(path, voices.np.tile(samples, 15), rate)


QUIET = (exclude(WAV),)
FP32 = (put("mixedprec", lambda v: not v),)
ANY = (*FORWARD, *BACKWARD)
EITHER = ("model_forward", "model_backward")
FAULTS = (
    one_line(
        *("F18", "attention over a fully masked row", FORWARD, ("model_forward",), ("softmax",), ATTENTION, QUIET),
        prepare=spoil(FIRST, times(1e-3)),
    ),
    one_line(
        *("F19", "root of the variance of constant features", BACKWARD, ("model_backward",), ("sqrt",), DEVIATION),
        every=True,
    ),
    one_line(
        *("F20", "variance by difference, root of a negative", ANY, EITHER, ("sqrt", "sub"), CANCELLATION), every=True
    ),
    one_line("F22", "where() over an unsafe branch", BACKWARD, ("model_backward",), ("sqrt",), WHERE, every=True),
    one_line("F23", "zero embedding over its norm, eps 1e-12", ANY, EITHER, ("sqrt", "div"), ZERO_LAYER, every=True),
    one_line("F25", "learned log scale at 89", FORWARD, ("model_forward",), ("exp", "mul"), LOG_SCALE, every=True),
    Fault("F26", "a batch of one row into BatchNorm", (), {"batch_size": 1}, status=2, said=("batches of one row",)),
    one_line(
        *("F27", "masked mean with nothing left", FORWARD, ("model_forward",), ("div",), MASKED_MEAN, QUIET),
        prepare=spoil(FIRST, times(1e-3)),
    ),
    one_line(
        *("F28", "a layer gives Inf above a threshold", FORWARD, ("model_forward",), ("div",), THRESHOLD, QUIET),
        prepare=spoil(FIRST, voices.square_wave),
    ),
    one_line(
        *("F29", "exponential activation overflows fp16", FORWARD, ("precision",), ("exp", "mul"), EXPONENTIAL),
        *(FULL_PRECISION, True),
        settings=HALF,
    ),
    one_line(
        *("F45", "activations above 65,504", FORWARD, ("precision",), ("convolution", "conv1d", "mul"), OVERFLOW),
        *(FULL_PRECISION, True),
        settings=HALF,
    ),
    one_line(
        *("F46", "eps 1e-10 is zero in fp16", FORWARD, ("precision",), ("div", "add"), TINY_EPS, FULL_PRECISION),
        settings=HALF,
    ),
    Fault(
        *("F49", "fp16 sum over a long test file", (), {**BAD, "max_nan_score_pct": 60.0, "max_test_pairs": 0}),
        plugins={"models/bad.py": HALF_SUM},
        prepare=long_trial,
        said=("test file trial001/session1/00001.flac", "spoils [0-9]+ trials"),
    ),
    one_line(
        *("F50", "bf16 variance by difference", ANY, ("precision",), ("sqrt", "sub"), BFLOAT_CANCELLATION, FP32),
        settings=BRAIN,
    ),
)
