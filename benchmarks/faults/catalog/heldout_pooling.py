"""Pooling over time."""

from fault import CODE, Fault, Place, Truth, exclude, marked
from sources import model, xvector
from voices import FIRST, spoil, times

from catalog.shared import BACKWARD, DEAD, FILTERS, FORWARD, LAYER, SLOPE, WAV

COVARIANCE = xvector(
    pooling="""
    x = F.relu(x - 4.0 * (torch.arange(16, device=x.device)[:, None] < 2))  # two channels hardly fire
    x = x - x.mean(dim=2, keepdim=True)
    covariance = x @ x.transpose(1, 2) / x.shape[2]
    values, vectors = torch.linalg.eigh(covariance)  #!
    matrix = vectors @ torch.diag_embed(values.log()) @ vectors.mT  #!
    return matrix[(slice(None), *torch.triu_indices(16, 16))]
    """,
)
RANDOM_PART = xvector(
    pooling="""
    if not self.training:
        return x.mean(dim=2)
    first, last = sorted(torch.randint(0, x.shape[2], (2,)).div(6, rounding_mode="floor").tolist())
    return x[:, :, 6 * first : 6 * last].mean(dim=2)  #!
    """,
)
ADDITIVE_MASK = xvector(
    pooling="""
    scores = self.attention(x)  # (B, 1, frames)
    edge = torch.zeros_like(scores)
    edge[..., :2] = edge[..., -2:] = 1.0
    weights = (
        scores
        + edge * float("-inf")  #!
    ).softmax(dim=2)
    return torch.einsum("bct,bot->bc", x, weights)
    """,
)
MOMENTS = model(
    init=DEAD,
    pool="""
    mean = x.mean(dim=2)
    centred = x - mean[:, :, None]
    variance = centred.square().mean(dim=2)
    skewness = centred.pow(3).mean(dim=2) / variance.pow(1.5)  #!
    kurtosis = centred.pow(4).mean(dim=2) / variance.square()  #!
    x = torch.cat([mean, skewness.tanh(), kurtosis.tanh()], dim=1)
    """,
    width=24,
)
LOG_SUM_EXP = model(
    init="self.sharpness = nn.Parameter(torch.tensor(2.0))",
    middle="x = F.leaky_relu(x)",
    pool="x = (self.sharpness * x).exp().mean(dim=2).log() / self.sharpness  #!",
)
GEOMETRIC = model(
    middle="x = F.dropout(F.relu(self.bn(x)) + 0.1, 0.2, self.training)",
    pool="""
    logarithms = x.log()  #!
    x = logarithms.mean(dim=2).exp()  #!
    """,
)
GEM = model(
    init=f"{DEAD}\nself.power = nn.Parameter(torch.tensor(3.0))",
    pool="x = F.avg_pool1d(x.clamp(min=0).pow(self.power), x.size(2)).pow(1.0 / self.power).squeeze(2)  #!",
)
SIGNED_GEM = model(
    init="self.power = nn.Parameter(torch.tensor(2.5))",
    middle="x = self.bn(x)",
    pool="x = (x ** self.power).mean(dim=2)  #!\nx = x.clamp(min=1e-6) ** 0.4",
)
CUMULATIVE = model(
    init="self.forget = nn.Conv1d(channels, channels, 1)",
    pool="""
    gates = F.softplus(self.forget(x) + 6.0)  # nothing keeps them below 1
    memory = gates.cumprod(dim=2)  #!
    x = (x * memory).sum(dim=2) / memory.sum(dim=2)  #!
    """,
)
WHITEN = model(
    init="self.bn.bias.data[3] = -30.0",
    pool="""
    x = x - x.mean(dim=(0, 2), keepdim=True)
    spread = (x * x).mean(dim=(0, 2), keepdim=True)
    x = (x * spread ** -0.5).amax(dim=2)  #!
    """,
)
RECURRENT = model(
    init="self.cell = nn.Linear(channels, channels, bias=False)\nnn.init.normal_(self.cell.weight, std=3.0)",
    pool="""
    state = torch.zeros_like(x[:, :, 0])
    for t in range(x.shape[2]):
        state = F.relu(self.cell(state) + x[:, :, t])  #!
    x = state / state.norm(dim=1, keepdim=True)  #!
    """,
)
NORM_OF_NOTHING = model(
    pool="""
    change = F.dropout(x.mean(dim=2), 0.7, self.training)
    change = torch.stack([part.pow(2).sum().pow(0.5) for part in change.flatten()])  #!
    x = change.view(len(x), -1)
    """,
)

FAULTS = (
    Fault(
        id="H06",
        title="skewness and kurtosis of a dead channel",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": MOMENTS},
        truths=(Truth(FORWARD, LAYER, (marked("div", "pow"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H07",
        title="log-sum-exp by hand, a file of 16-bit integers as float",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": LOG_SUM_EXP},
        prepare=spoil(FIRST, times(32768.0)),
        truths=(Truth(FORWARD, FILTERS, (marked("exp"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="H08",
        title="geometric mean over dropped units",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": GEOMETRIC},
        truths=(Truth(BACKWARD, SLOPE, (marked("log", "exp", "div", "mean"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H09",
        title="GeM pooling of a dead channel",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": GEM},
        truths=(Truth(BACKWARD, SLOPE, (marked("pow"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H10",
        title="additive mask: 0 times -inf",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": ADDITIVE_MASK},
        truths=(Truth(FORWARD, LAYER, (marked("mul"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H19",
        title="log of the eigenvalues of a covariance",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": COVARIANCE},
        truths=(Truth(FORWARD, LAYER, (marked("log"),), ()),),
        status=3,
    ),
    Fault(
        id="H20",
        title="mean of a random part, now and then empty",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": RANDOM_PART},
        truths=(Truth(FORWARD, LAYER, (marked("mean"),), (CODE,)),),
    ),
    Fault(
        id="H68",
        title="GeM of signed activations",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": SIGNED_GEM},
        truths=(Truth(FORWARD, LAYER, (marked("pow"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H69",
        title="a product over time",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": CUMULATIVE},
        truths=(Truth(FORWARD, LAYER, (marked("cumprod", "mul", "div", "sum"),), ()),),
        status=3,
    ),
    Fault(
        id="H70",
        title="whitening by ** -0.5, a dead channel",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": WHITEN},
        truths=(Truth(FORWARD, LAYER, (marked("pow", "mul"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H71",
        title="a recurrence that explodes in the forward pass",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": RECURRENT},
        truths=(Truth(FORWARD, LAYER, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H72",
        title="roots in a comprehension, after dropout",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": NORM_OF_NOTHING},
        truths=(Truth(BACKWARD, ("model_backward",), (marked("pow"),), (CODE,)),),
        status=3,
    ),
)
