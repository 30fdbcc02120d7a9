"""16-bit arithmetic."""

from fault import CODE, FULL_PRECISION, Fault, Truth, marked, put
from sources import loss, model

from catalog.shared import ANY, BRAIN, FORWARD, FP32, HALF, PRECISION

ENERGY = model(
    pool="""
    energy = (x * 100.0).pow(2).sum(dim=1)  #!
    x = x.mean(dim=2) * torch.log1p(energy).mean(dim=1, keepdim=True)
    """
)
ATTENTION = model(
    init="""
    self.query, self.key = nn.Linear(channels, 16), nn.Linear(channels, 16)
    for layer in (self.query, self.key):
        nn.init.normal_(layer.weight, std=0.3)
    """,
    pool="""
    x = x.transpose(1, 2)
    scores = self.query(x) @ self.key(x).transpose(1, 2)  # (B, frames, frames), not scaled
    weights = scores.exp()  #!
    weights = weights / weights.sum(dim=2, keepdim=True)  #!
    x = (weights @ x).mean(dim=1)
    """,
)
LINEAR_ATTENTION = model(
    init="self.project = nn.Conv1d(channels, 3 * channels, 1)",
    pool="""
    query, key, value = self.project(x * 150.0).chunk(3, dim=1)
    context = torch.bmm(key, value.transpose(1, 2)) / x.shape[2]  #!
    x = (context.float().softmax(dim=2).to(query) @ query).mean(dim=2)
    """,
)
UNIT_FRAMES = model(
    init="self.bn.bias.data[:] = -1.5",
    pool="""
    x = F.normalize(x, dim=1)  #!
    x = x.mean(dim=2)
    """,
)
SURVIVAL = model(
    init="self.hazard = nn.Conv1d(channels, 1, 1)\nself.hazard.bias.data[:] = 6.0",
    pool="""
    p = torch.sigmoid(self.hazard(x))
    hazard = torch.log(1 - p)  #!
    x = (x * (hazard / 10).exp()).mean(dim=2) + hazard.mean(dim=2)
    """,
)
OWN_HALF = model(
    helper='''
    class Fast(nn.Module):
        """A layer that was ported from inference and still computes in 16 bit."""

        def __init__(self, channels):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(channels, channels))

        def forward(self, x):
            x = torch.einsum("oc,bct->bot", self.weight.half(), x.half() * 2e4)  #!
            return x.float() / 2e4
    ''',
    init="self.fast = Fast(channels)",
    middle="x = self.fast(F.relu(self.bn(x)))",
)
HALF_HEAD = loss(
    """
    cosine = F.linear(F.normalize(x), F.normalize(self.weight))  # 16 bit under autocast
    target = cosine[torch.arange(len(label)), label]
    likelihood = torch.exp(-self.scale * (1.0 - target))  #!
    logits = self.scale * cosine
    loss = F.cross_entropy(logits.float(), label) - 0.01 * torch.log(likelihood).float().mean()  #!
    """
)

FAULTS = (
    Fault(
        id="H34",
        title="sum of squares over channels in fp16",
        settings={**HALF, "model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": ENERGY},
        truths=(Truth(FORWARD, PRECISION, (marked("sum", "pow", "mul"),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="H35",
        title="softmax of attention by hand in fp16",
        settings={**HALF, "model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": ATTENTION},
        truths=(Truth(ANY, PRECISION, (marked("exp", "sum", "div"),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="H36",
        title="key times value over all frames in fp16",
        settings={**HALF, "model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": LINEAR_ATTENTION},
        truths=(Truth(ANY, PRECISION, (marked("bmm", "matmul"),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="H37",
        title="unit length of silent frames, eps 1e-12 in fp16",
        settings={**HALF, "model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": UNIT_FRAMES},
        truths=(Truth(ANY, PRECISION, (marked(),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
    Fault(
        id="H38",
        title="log(1 - p) where p rounds to 1 in bf16",
        settings={**BRAIN, "model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": SURVIVAL},
        truths=(
            Truth(
                ANY,
                PRECISION,
                (marked("log", "rsub", "sub"),),
                (CODE, *FP32, put("amp_dtype", lambda v: v == "float16")),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H39",
        title="a layer that casts to fp16 by itself",
        settings={**HALF, "model": "unseen", "nan_patience": 4, "mixedprec": False},
        plugins={"models/unseen.py": OWN_HALF},
        truths=(Truth(ANY, ("precision", "model_forward"), (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H40",
        title="a likelihood below the least fp16 number",
        settings={**HALF, "trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": HALF_HEAD},
        truths=(Truth(ANY, PRECISION, (marked("log", "exp", "div"),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
)
