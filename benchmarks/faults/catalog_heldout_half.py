"""Held-out faults of 16-bit arithmetic: H34 to H40."""

from catalog_heldout_features import BACKWARD, FORWARD, UNSEEN
from fault import CODE, FULL_PRECISION, Fault, Place, Truth, put
from sources import loss, model

HALF = {"mixedprec": True, "amp_dtype": "float16"}
BRAIN = {"mixedprec": True, "amp_dtype": "bfloat16"}
ANY, PRECISION = (*FORWARD, *BACKWARD), ("precision",)
FP32 = (put("mixedprec", lambda v: not v),)


def of_half(id, title, reasons, ops, source, every=True, fixes=FULL_PRECISION, where="model", **more) -> Fault:
    """A fault of a marked line that fp32 does not have."""
    kind = {"model": ("models/unseen.py", UNSEEN), "loss": ("loss/unseen.py", {"trainfunc": "unseen"})}[where]
    settings = {**HALF, **kind[1], "nan_patience": 4 if every else 1000, **more.pop("settings", {})}
    more |= {"status": 3} if every else {}
    truth = Truth(reasons, more.pop("causes", PRECISION), (Place(code=True, ops=ops),), (CODE, *fixes))
    return Fault(id, title, (truth,), settings, {kind[0]: source}, **more)


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
    of_half("H34", "sum of squares over channels in fp16", FORWARD, ("sum", "pow", "mul"), ENERGY),
    of_half("H35", "softmax of attention by hand in fp16", ANY, ("exp", "sum", "div"), ATTENTION),
    of_half("H36", "key times value over all frames in fp16", ANY, ("bmm", "matmul"), LINEAR_ATTENTION),
    of_half("H37", "unit length of silent frames, eps 1e-12 in fp16", ANY, (), UNIT_FRAMES),
    of_half(
        *("H38", "log(1 - p) where p rounds to 1 in bf16", ANY, ("log", "rsub", "sub"), SURVIVAL),
        settings=BRAIN,
        fixes=(*FP32, put("amp_dtype", lambda v: v == "float16")),
    ),
    of_half(
        *("H39", "a layer that casts to fp16 by itself", ANY, (), OWN_HALF),
        settings={"mixedprec": False},
        causes=("precision", "model_forward"),
        fixes=(),
    ),
    of_half("H40", "a likelihood below the least fp16 number", ANY, ("log", "exp", "div"), HALF_HEAD, where="loss"),
)
