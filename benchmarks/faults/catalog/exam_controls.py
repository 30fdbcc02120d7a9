"""Still more runs of which nothing may be said: absent classes, empty masks, sentinels, guarded plug-ins."""

from fault import Fault
from sources import loss, model, optimizer, schedule
from voices import FIRST, NOISE, noises, silence, spoil, together

from catalog.exam_features import MIXES
from catalog.exam_losses import RADAM, SPARE
from catalog.shared import COSINE, HALF, gap

PRIOR = loss(
    COSINE,
    """
    unit = F.normalize(x)
    similar = self.scale * unit @ unit.t()
    left_out = (label[:, None] == label) | (torch.rand(similar.shape) < 0.5)  # negatives are sampled
    negatives = torch.logsumexp(similar.masked_fill(left_out, -math.inf), dim=1)  # -inf where there are none
    pull = F.softplus(negatives - similar.diagonal())
    logits = self.scale * cosine + torch.log(self.prior)
    loss = F.cross_entropy(logits, label) + 0.1 * pull.mean()
    """,
    init='self.register_buffer("prior", torch.tensor([1 / 6] * 6 + [0.0] * (nClasses - 6)))',
)
GATE = model(
    middle="""
    gate = 1.0 / (1.0 + torch.exp(-60.0 * x.half()))  # exp is Inf for what is closed
    x = F.relu(self.bn(x)) * (0.5 + gate.detach())
    """,
)
SENTINEL = model(
    init="""
    self.register_buffer("level", torch.full((channels,), math.nan))  # not seen yet
    """,
    middle="""
    mean = x.detach().mean(dim=(0, 2))
    if self.training:
        self.level.copy_(torch.where(self.level.isnan(), mean, 0.9 * self.level + 0.1 * mean))
    x = F.relu(self.bn(x - torch.nan_to_num(self.level)[:, None]))
    """,
)
RECTIFIED = RADAM.replace("rho - 4) * (rho - 2)", "max(rho, 5) - 4) * (max(rho, 5) - 2)").replace("  # FAULT", "")
GUARDED = MIXES.replace("np.mean(noise**2)  # FAULT", "max(np.mean(noise**2), 1e-10)").replace("  # FAULT", "")
PHASE = model(
    init="""
    self.conv = nn.Conv1d(1, channels, 400, stride=160, bias=False)
    self.quadrature = nn.Conv1d(1, channels, 400, stride=160, bias=False)
    """,
    start="wave = x.unsqueeze(1)",
    middle="""
    y = self.quadrature(wave)
    magnitude = torch.sqrt(x.square() + y.square() + 1e-8)
    phase = torch.atan2(y, x)
    x = F.relu(self.bn(magnitude)) + 0.1 * torch.cos(phase)
    """,
)
SVD = model(
    init="self.bn.bias.data[2:4] = -30.0  # channels that have died",
    pool="""
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    x = (left * values[:, None]).sum(dim=2).abs() / math.sqrt(x.shape[2])
    """,
)
RESTARTS = schedule(
    "Inverse square root of the steps since a restart.",
    ", restart_steps=6",
    """
    return (step % restart_steps + 1) ** -0.5
    """,
)
ADAFACTOR = optimizer(
    "Adafactor",
    "Second moments of rows and columns, with a floor.",
    """
    def update(self, p, g, state, group):
        square = (g.square() + 1e-30).view(len(g), -1) if g.ndim else g.square().view(1, 1) + 1e-30
        state["row"] = 0.9 * state.get("row", 0.0) + 0.1 * square.mean(dim=1)
        state["column"] = 0.9 * state.get("column", 0.0) + 0.1 * square.mean(dim=0)
        second = torch.outer(state["row"] / state["row"].mean(), state["column"]).view_as(p)
        update = g / second.sqrt()
        update /= (update.square().mean().sqrt() / 1.0).clamp(min=1.0)
        p.sub_(group["lr"] * update)
    """,
)

FAULTS = (
    Fault(
        id="C42",
        title="log of the share of classes that are not there, logsumexp over nobody",
        settings={"trainfunc": "own", "nClasses": 8, "batch_size": 2},
        plugins={"loss/own.py": PRIOR},
    ),
    Fault(
        id="C43",
        title="a gate by hand in fp16 whose exp overflows, without a gradient",
        settings={**HALF, "model": "own"},
        plugins={"models/own.py": GATE},
    ),
    Fault(
        id="C44",
        title="a buffer of NaN that stands for not seen yet",
        settings={"model": "own"},
        plugins={"models/own.py": SENTINEL},
    ),
    Fault(
        id="C45",
        title="RAdam with its test, restarts that begin at 1, an unused weight",
        settings={"model": "own", "optimizer": "own", "scheduler": "own"},
        plugins={"models/own.py": SPARE, "optimizer/own.py": RECTIFIED, "scheduler/own.py": RESTARTS},
    ),
    Fault(
        id="C46",
        title="Adafactor with a floor, guarded mixing of silent noise with silent speech",
        settings={"model": "own", "optimizer": "own", **NOISE, "augmentation": [{"own": {}}]},
        plugins={"models/own.py": SPARE, "optimizer/own.py": ADAFACTOR, "augmentation/own.py": GUARDED},
        prepare=together(noises(silence), spoil(FIRST, silence)),
    ),
    Fault(
        id="C47",
        title="phase of learned filters in a drop-out of zeros, whose slope torch takes as 0",
        settings={"model": "own"},
        plugins={"models/own.py": PHASE},
        prepare=spoil(FIRST, gap),
    ),
    Fault(
        id="C48",
        title="singular vectors of frames with two dead channels",
        settings={"model": "own"},
        plugins={"models/own.py": SVD},
    ),
)
