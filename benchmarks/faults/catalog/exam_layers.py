"""Layers and 16-bit arithmetic of one's own: kernels of attention, factorisations, scans, hooks, spectral norms."""

from fault import CODE, FULL_PRECISION, Fault, Place, Truth, exclude, marked
from sources import model
from voices import FIRST, spoil, times

from catalog.shared import BACKWARD, BRAIN, DEAD, FORWARD, HALF, LAYER, PRECISION, SLOPE, WAV

KERNEL = model(
    init="self.qkv = nn.Linear(channels, 3 * channels)",
    pool="""
    query, key, value = self.qkv(x.transpose(1, 2)).chunk(3, dim=2)
    query, key = F.relu(query - 0.3), F.relu(key - 0.3)
    context = torch.einsum("btk,btv->bkv", key, value)
    norm = torch.einsum("btk,bk->bt", query, key.sum(dim=1))
    x = torch.einsum("btk,bkv->btv", query, context) / norm[..., None]  #!
    x = x.mean(dim=1)
    """,
)
GROUP_NORM = model(
    init="""
    self.bn.bias.data[2:4] = -30.0  # a group that has died
    self.norm = nn.GroupNorm(4, channels, eps=0.0)  #!
    """,
    middle="""
    x = F.relu(self.bn(x))
    x = self.norm(x)  #!
    """,
)
DISTANCE = model(
    init="self.slope = nn.Parameter(torch.ones(()))",
    pool="""
    place = torch.arange(x.shape[2])
    distance = (place[:, None] - place).abs()
    bias = self.slope * torch.log(distance)  #!
    score = torch.einsum("bct,bcs->bts", x, x) / math.sqrt(x.shape[1]) - bias
    x = torch.einsum("bts,bcs->bct", torch.softmax(score, dim=2), x).mean(dim=2)
    """,
)
SPECTRAL = model(
    helper='''
    class SpectralLinear(nn.Module):
        """A linear layer over its largest singular value, by one step of the power iteration."""

        def __init__(self, size):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(size, size))  #!
            self.register_buffer("u", F.normalize(torch.randn(size), dim=0))

        def forward(self, x):
            with torch.no_grad():
                v = self.weight.t() @ self.u
                v = v / v.norm()  #!
                u = self.weight @ v
                self.u.copy_(u / u.norm())  #!
            sigma = self.u @ (self.weight @ v)
            return F.linear(x, self.weight / sigma)  #!
    ''',
    init="self.residual = SpectralLinear(channels)",
    pool="""
    x = x.mean(dim=2)
    x = x + self.residual(x)
    """,
)
MISH = model(
    helper='''
    class Mish(torch.autograd.Function):
        """x tanh(softplus(x)), which keeps its input alone."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * torch.tanh(F.softplus(x))

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            e = torch.exp(x)  #!
            omega = 4.0 * (x + 1.0) + 4.0 * e**2 + e**3 + e * (4.0 * x + 6.0)  #!
            delta = 2.0 * e + e**2 + 2.0  #!
            return grad * e * omega / delta.square()  #!
    ''',
    middle="x = Mish.apply(40.0 * self.bn(x))  #!",
)
PRE_HOOK = model(
    helper="""
    def peak_normalise(module, inputs):
        (x,) = inputs
        return (x / x.amax(dim=2, keepdim=True),)  #!
    """,
    init=f"""
    {DEAD}
    self.mix = nn.Conv1d(channels, channels, 1)
    self.mix.register_forward_pre_hook(peak_normalise)
    """,
    middle="x = self.mix(F.relu(self.bn(x)))",
)
SCAN = model(
    init="""
    self.rate = nn.Conv1d(channels, channels, 1)
    nn.init.constant_(self.rate.bias, 2.0)
    """,
    pool="""
    decay = torch.cumsum(F.softplus(self.rate(x)), dim=2)  # a state space model's, for all frames at once
    x = torch.exp(-decay) * torch.cumsum(x * torch.exp(decay), dim=2)  #!
    x = x.mean(dim=2)
    """,
)
QR = model(
    init=DEAD,
    pool="""
    frames = x.transpose(1, 2)
    q, r = torch.linalg.qr(frames)  #!
    x = r.diagonal(dim1=1, dim2=2).abs() / math.sqrt(frames.shape[1])
    """,
)
FISHER = model(
    pool="""
    unit = F.normalize(x - x.mean(dim=2, keepdim=True), dim=2)
    correlation = torch.einsum("bct,bdt->bcd", unit, unit)
    x = torch.atanh(correlation).mean(dim=2)  #!
    """,
)
CORRELATION = model(
    init=DEAD,
    pool="""
    statistics = []
    for row in x:
        statistics.append(torch.corrcoef(row).mean(dim=1))  #!
    x = torch.stack(statistics)
    """,
)
LOGIT = model(
    init="""
    self.gate = nn.Linear(channels, channels)
    nn.init.constant_(self.gate.weight, 2.0)
    """,
    end="""
    gate = torch.sigmoid(4.0 * self.gate(x))
    x = x + 0.1 * torch.logit(gate)  #!
    return self.fc(x)
    """,
)
GUMBEL = model(
    init="self.score = nn.Conv1d(channels, 1, 1)",
    pool="""
    score = self.score(x)
    uniform = torch.rand(score.shape).to(score.dtype)  #!
    gumbel = -torch.log(-torch.log(uniform))  #!
    share = torch.softmax((score + gumbel) / 0.5, dim=2)  #!
    x = (share * x).sum(dim=2)
    """,
)
LOUD = "loud = x.unfold(1, 400, 160).abs().amax(dim=2) > 0.02"
MINUS_1E9 = model(
    init="self.score = nn.Conv1d(channels, 1, 1)",
    start=LOUD,
    pool="""
    score = self.score(x).squeeze(1)
    score = score.masked_fill(~loud, -1e9)  #!
    x = (torch.softmax(score, dim=1)[:, None] * x).sum(dim=2)
    """,
)
TWICE_MASKED = model(
    init="""
    self.first = nn.Linear(channels, 2 * channels)
    self.second = nn.Linear(channels, 2 * channels)
    """,
    start=LOUD,
    pool="""
    x = x.transpose(1, 2)  # (B, frames, channels)
    mask = torch.zeros_like(loud, dtype=x.dtype).masked_fill(~loud, torch.finfo(x.dtype).min)
    score = 0.0
    for layer in (self.first, self.second):  # each adds to the scores of the layer before
        query, key = layer(x).chunk(2, dim=2)
        score = score + query @ key.transpose(1, 2) / math.sqrt(x.shape[2]) + mask[:, None]  #!
        x = x + torch.softmax(score, dim=2) @ x  #!
    x = x.mean(dim=1)
    """,
)
GELU = model(
    middle="""
    x = 2000.0 * x
    x = 0.5 * x * (1.0 + torch.tanh(0.7978846 * (x + 0.044715 * x * x * x)))  #!
    x = F.relu(self.bn(x))
    """,
)
CUMULATIVE = model(
    middle="""
    x = F.relu(3000.0 * x)
    count = x.shape[1] * torch.arange(1, x.shape[2] + 1)
    mean = (x.sum(dim=1).cumsum(dim=1) / count)[:, None]  #!
    power = (x.square().sum(dim=1).cumsum(dim=1) / count)[:, None]  #!
    x = (x - mean) / (power - mean.square() + 1e-5).sqrt()  #!
    """,
)

FAULTS = (
    Fault(
        id="X16",
        title="linear attention with a ReLU kernel, a query of zeros",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": KERNEL},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X17",
        title="nn.GroupNorm with eps 0, a dead group",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": GROUP_NORM},
        truths=(Truth(FORWARD, LAYER, (marked("native_group_norm", "group_norm"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X18",
        title="a position bias that is the log of a distance of 0",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": DISTANCE},
        truths=(Truth(FORWARD, LAYER, (marked("log"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X19",
        title="spectral norm by hand of a layer that starts at 0",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": SPECTRAL},
        truths=(Truth(FORWARD, LAYER, (marked("div"), Place(parameters=("__S__.residual.weight",))), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X20",
        title="Mish of one's own: exp overflows in backward() alone",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": MISH},
        truths=(Truth(BACKWARD, SLOPE, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X21",
        title="a forward pre-hook divides by the peak of a dead channel",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": PRE_HOOK},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X22",
        title="a scan over all frames at once, exp of summed rates",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": SCAN},
        truths=(Truth(FORWARD, LAYER, (marked("exp"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X23",
        title="QR of frames with a dead channel, backward",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": QR},
        truths=(Truth(BACKWARD, SLOPE, (marked("linalg_qr", "qr"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X25",
        title="Fisher's z of a channel's correlation with itself",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": FISHER},
        truths=(Truth((*FORWARD, *BACKWARD), (*LAYER, *SLOPE), (marked("atanh"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X26",
        title="torch.corrcoef of a dead channel, in a loop over rows",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": CORRELATION},
        truths=(Truth(FORWARD, LAYER, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X27",
        title="logit of a gate that has saturated",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": LOGIT},
        truths=(Truth(FORWARD, LAYER, (marked("logit"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X28",
        title="Gumbel noise of a draw that bf16 rounds to 1",
        settings={**BRAIN, "model": "own", "nan_patience": 1000},
        plugins={"models/own.py": GUMBEL},
        truths=(Truth(FORWARD, (*PRECISION, *LAYER), (marked(),), (CODE, FULL_PRECISION[0])),),
    ),
    Fault(
        id="X29",
        title="masked_fill(-1e9), a number that fp16 does not have",
        settings={**HALF, "model": "own", "nan_patience": 4},
        plugins={"models/own.py": MINUS_1E9},
        truths=(Truth(FORWARD, (*PRECISION, *LAYER), (marked(),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="X30",
        title="the lowest number as a mask, added twice, a quiet file",
        settings={"model": "own", "nan_patience": 1000},
        plugins={"models/own.py": TWICE_MASKED},
        prepare=spoil(FIRST, times(1e-3)),
        truths=(Truth(FORWARD, (*LAYER, "input"), (marked(), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="X31",
        title="GELU by hand in fp16: the cube overflows, the slope is NaN",
        settings={**HALF, "model": "own", "nan_patience": 4},
        plugins={"models/own.py": GELU},
        truths=(Truth((*BACKWARD, "scale_collapse"), PRECISION, (marked(),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="X32",
        title="cumulative layer norm in fp16",
        settings={**HALF, "model": "own", "nan_patience": 1000},
        plugins={"models/own.py": CUMULATIVE},
        truths=(Truth((*FORWARD, *BACKWARD), PRECISION, (marked(),), (CODE, *FULL_PRECISION)),),
    ),
)
