"""What plug-ins bring with them: their own draws and memories, operations that refuse numbers, functions with poles."""

from fault import CODE, Fault, Place, Truth, exclude, marked, put
from sources import loss, model, optimizer, schedule
from voices import FIRST, silence, spoil

from catalog.shared import ANY, BRAIN, COSINE, FORWARD, HALF, LAYER, LOSS, SLOPE, WAV

DRAWN_BY_NUMPY = model(
    middle="""
    keep = torch.ones(x.shape[2])
    if self.training:  # drawn from numpy's global generator
        keep = torch.from_numpy((numpy.random.rand(x.shape[2]) > 0.9).astype("float32"))
    x = F.relu(self.bn(x * keep))
    """,
    pool="x = (x * keep).sum(dim=2) / keep.sum()  #!",
).replace("import torch\n", "import numpy\nimport torch\n", 1)
# One silent recording makes NaN; what remembers an embedding of it spoils the steps after it too.
ENERGY = model(start="x = x / x.square().mean(dim=1, keepdim=True).sqrt()  #!")
MEMORY = loss(
    COSINE,
    """
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label)
    if self.memory:
        loss = loss + 0.1 * (F.normalize(x) @ torch.cat(self.memory[-6:]).t()).relu().mean()
    self.memory.append(F.normalize(x).detach())
    """,
    init="self.memory = []",
)
QUEUE = loss(
    COSINE,
    """
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) + 0.1 * (F.normalize(x) @ self.queue.clone().t()).relu().mean()
    self.queue[self.place : self.place + len(x)] = F.normalize(x).detach()
    self.place = (self.place + len(x)) % 590
    """,
    init="""
    self.queue = F.normalize(torch.randn(600, nOut))  # no buffer
    self.place = 0
    """,
)
NOT_DEFINITE = loss(
    COSINE,
    """
    logits = self.scale * cosine
    centred = x - x.mean(dim=0)
    factor = torch.linalg.cholesky(centred.t() @ centred)  #!
    loss = F.cross_entropy(logits, label) + 0.1 * factor.diagonal().log().mean()
    """,
)
NO_PROBABILITY = model(
    pool="""
    share = torch.softmax(x.mean(dim=1), dim=1)
    share = share / (share.sum(dim=1, keepdim=True) - share.sum(dim=1, keepdim=True))  #!
    picked = torch.multinomial(share, 4)
    x = x.gather(2, picked[:, None].expand(-1, x.shape[1], -1)).mean(dim=2)
    """,
)
NO_SCALE = loss(
    COSINE,
    """
    logits = self.scale * cosine
    spread = torch.distributions.Normal(x[:, 1], F.relu(x[:, 0] - 100.0))  #!
    loss = F.cross_entropy(logits, label) - 0.01 * spread.log_prob(torch.zeros(len(x))).mean()
    """,
)
COMPLEX_RATE = schedule(
    "Polynomial decay.",
    ", decay_steps=5",
    """
    return (1 - (step + 1) / decay_steps) ** 0.9  #!
    """,
)
VON_MISES_FISHER = loss(
    COSINE,
    """
    kappa = x.norm(dim=1) * 60.0 + 60.0
    log_constant = torch.log(kappa) - torch.log(torch.sinh(kappa))  #!
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) - 0.01 * log_constant.mean()
    """,
)
EVIDENCE = loss(
    COSINE,
    """
    logits = self.scale * cosine
    alpha = F.relu(cosine)  # the 1 was forgotten
    total = alpha.sum(dim=1, keepdim=True)
    own = F.one_hot(label, self.classes)
    loss = (own * (torch.digamma(total) - torch.digamma(alpha))).sum(dim=1).mean()  #!
    """,
)
CODEBOOK = model(
    init="""
    self.register_buffer("codes", torch.randn(4, 8))
    """,
    pool="""
    x = x.mean(dim=2)
    with torch.no_grad():
        nearest = F.one_hot(torch.cdist(x, self.codes).argmin(dim=1), 4).float()
        self.codes.copy_((nearest.t() @ x) / nearest.sum(dim=0)[:, None])  #!
    """,
)
SINC = model(
    init="self.low = nn.Parameter(torch.linspace(50.0, 7000.0, 8))",
    middle="""
    t = torch.arange(-50, 51) / 16000.0
    angle = 2 * math.pi * self.low[:, None] * t
    filters = torch.where(t == 0, torch.ones(()), torch.sin(angle) / angle)  #!
    x = F.relu(self.bn(x)) + 1e-3 * filters.mean()
    """,
)
ANGLE_IN_BF16 = model(
    pool="""
    x = x.mean(dim=2)
    unit = F.normalize(x, dim=1).to(torch.bfloat16)
    angle = torch.acos((unit * unit).sum(dim=1))  #!
    x = x + angle[:, None].float()
    """,
)
HALF_MOMENT = optimizer(
    "HalfMoments",
    "Second moments in half precision.",
    """
    def update(self, p, g, state, group):
        before = state["v"].float() if "v" in state else torch.zeros_like(p)
        state["v"] = (0.9 * before + 0.1 * (g * 1e4).square()).half()  #!
        p.sub_(group["lr"] * g / (state["v"].float().sqrt() + 1e-8))
    """,
)
NEWTON_SCHULZ = optimizer(
    "Muon",
    "Newton-Schulz of a gradient that is not normalised.",
    """
    def update(self, p, g, state, group):
        x = g.flatten(1) * 100.0 if p.ndim > 1 else g
        for _ in range(6 if p.ndim > 1 else 0):
            a = x @ x.t()
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x  #!
        p.sub_(group["lr"] * x.view_as(p))
    """,
)
WHITEN = optimizer(
    "Whiten",
    "A gradient is whitened by the factors of its products, a matrix that may have none.",
    """
    def update(self, p, g, state, group):
        if p.ndim == 2:
            state["products"] = 0.9 * state.get("products", 0.0) + 0.1 * g @ g.t()
            factors = torch.linalg.cholesky(state["products"])  #!
            g = torch.linalg.solve_triangular(factors, g, upper=False)
        p.sub_(group["lr"] * g)
    """,
)
STEP_ZERO = optimizer(
    "Warm",
    "The mean gradient is corrected for its start by a count that begins at 0.",
    """
    def update(self, p, g, state, group):
        count, mean, square = state.get("count", 0), state.get("mean", 0.0), state.get("square", 0.0)
        state["count"], state["mean"], state["square"] = count + 1, 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g * g
        p.sub_(group["lr"] * (state["mean"] / (1 - 0.9**count)) / (state["square"].sqrt() + 1e-8))  #!
    """,
)
MIXTURE = loss(
    """
    distance = (x[:, None, None] - self.centres).square().sum(dim=3)  # (B, classes, 2)
    width = torch.exp(self.width)
    density = torch.exp(-0.5 * distance / width**2) / width
    logits = torch.log((torch.softmax(self.share, dim=1) * density).sum(dim=2))  #!
    loss = F.cross_entropy(logits, label)
    """,
    init="""
    self.centres = nn.Parameter(5 * torch.randn(nClasses, 2, nOut))
    self.width = nn.Parameter(torch.full((nClasses, 2), -1.5))
    self.share = nn.Parameter(torch.zeros(nClasses, 2))
    """,
)
HALF_DIVERGENCE = loss(
    """
    logits = F.linear(x, self.weight)
    p = torch.softmax(60 * logits.half(), dim=1)
    q = torch.softmax(60 * F.linear(x, self.other).half(), dim=1)
    divergence = (p * (p.log() - q.log())).sum(dim=1).mean()  #!
    loss = F.cross_entropy(logits, label) + 0.1 * divergence.float()
    """,
    init="self.other = nn.Parameter(torch.randn(nClasses, nOut))",
)
SILENT = Truth(FORWARD, ("frontend", "input", *LAYER), (marked(), Place(files=(WAV,))), (CODE, exclude(WAV)))


def one_dump_an_epoch(workspace):
    """A refused step must leave nothing behind that spoils another one."""
    steps = len(workspace.incidents())
    return None if steps == 2 else f"{steps} steps failed, not those of the silent file alone"


FAULTS = (
    Fault(
        id="P01",
        title="frames dropped by numpy's generator, now and then all",
        settings={"model": "own", "max_frames": 20, "nan_patience": 50},
        plugins={"models/own.py": DRAWN_BY_NUMPY},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
    ),
    Fault(
        id="P02",
        title="a list remembers embeddings, a silent file",
        settings={"model": "own", "trainfunc": "own", "nan_patience": 50},
        plugins={"loss/own.py": MEMORY, "models/own.py": ENERGY},
        prepare=spoil(FIRST, silence),
        truths=(SILENT,),
        check=one_dump_an_epoch,
    ),
    Fault(
        id="P03",
        title="a queue of 7,200 numbers is no buffer, a silent file",
        settings={"model": "own", "trainfunc": "own", "nan_patience": 50},
        plugins={"loss/own.py": QUEUE, "models/own.py": ENERGY},
        prepare=spoil(FIRST, silence),
        truths=(SILENT,),
        check=one_dump_an_epoch,
    ),
    Fault(
        id="P04",
        title="cholesky refuses a covariance of four rows",
        settings={"trainfunc": "own", "nan_patience": 4},
        plugins={"loss/own.py": NOT_DEFINITE},
        truths=(Truth(FORWARD, LOSS, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="P05",
        title="multinomial refuses 0/0",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": NO_PROBABILITY},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="P06",
        title="a normal distribution refuses a scale of 0",
        settings={"trainfunc": "own", "nan_patience": 4},
        plugins={"loss/own.py": NO_SCALE},
        truths=(Truth(FORWARD, LOSS, (marked(),)),),
        status=3,
    ),
    Fault(
        id="P07",
        title="a power of a negative number: a complex rate",
        settings={"scheduler": "own", "nan_patience": 4},
        plugins={"scheduler/own.py": COMPLEX_RATE},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(keys=("lr", "scheduler"))),
                (CODE, put("scheduler", lambda v: v != "own")),
            ),
        ),
        status=3,
    ),
    Fault(
        id="P08",
        title="log of sinh, which overflows",
        settings={"trainfunc": "own", "nan_patience": 4},
        plugins={"loss/own.py": VON_MISES_FISHER},
        truths=(Truth(FORWARD, LOSS, (marked("sinh"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="P09",
        title="digamma at its pole, times 0",
        settings={"trainfunc": "own", "nan_patience": 4},
        plugins={"loss/own.py": EVIDENCE},
        truths=(Truth(FORWARD, LOSS, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="P10",
        title="a codebook entry that nobody uses, in a buffer",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": CODEBOOK},
        truths=(Truth((*ANY, "state_nonfinite"), LAYER, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="P11",
        title="where() over sin(x) / x at 0",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": SINC},
        truths=(Truth(("grad_nonfinite",), SLOPE, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="P12",
        title="the angle of a unit vector with itself in bf16",
        settings={**BRAIN, "model": "own", "nan_patience": 4},
        plugins={"models/own.py": ANGLE_IN_BF16},
        truths=(Truth(ANY, ("precision", *LAYER), (marked("acos"),)),),
        status=3,
    ),
    Fault(
        id="P13",
        title="a moment in half precision overflows",
        settings={"optimizer": "own", "nan_patience": 4},
        plugins={"optimizer/own.py": HALF_MOMENT},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer", "precision"),
                (marked(),),
                (CODE, put("optimizer", lambda v: v != "own")),
            ),
        ),
        status=3,
    ),
    Fault(
        id="P14",
        title="a matrix iteration of an optimizer diverges",
        settings={"optimizer": "own", "nan_patience": 4},
        plugins={"optimizer/own.py": NEWTON_SCHULZ},
        truths=(Truth(("state_nonfinite",), ("optimizer",), (marked(),), (put("optimizer", lambda v: v != "own"),)),),
        status=3,
    ),
    Fault(
        id="P15",
        title="the correction of a mean gradient divides by 0 at step 0",
        settings={"optimizer": "own", "nan_patience": 4},
        plugins={"optimizer/own.py": STEP_ZERO},
        truths=(
            Truth(("state_nonfinite",), ("optimizer",), (marked(),), (CODE, put("optimizer", lambda v: v != "own"))),
        ),
        status=3,
    ),
    Fault(
        id="P16",
        title="log of a mixture of densities that vanish",
        settings={"trainfunc": "own", "nan_patience": 4},
        plugins={"loss/own.py": MIXTURE},
        truths=(Truth(FORWARD, LOSS, (marked("log"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="P17",
        title="two logarithms of what was cast to fp16 lines before",
        settings={**HALF, "trainfunc": "own", "nan_patience": 4},
        plugins={"loss/own.py": HALF_DIVERGENCE},
        truths=(Truth(ANY, ("precision", *LOSS), (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="P18",
        title="an optimizer asks for the factors of a matrix that has none",
        settings={"optimizer": "own", "nan_patience": 4},
        plugins={"optimizer/own.py": WHITEN},
        truths=(
            Truth(("state_nonfinite",), ("optimizer",), (marked(),), (CODE, put("optimizer", lambda v: v != "own"))),
        ),
        status=3,
    ),
)
