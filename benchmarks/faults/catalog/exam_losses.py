"""Losses, optimizers and schedules of one's own: counts of nothing, centres, queues, step sizes."""

from fault import CODE, Fault, Place, Truth, exclude, marked, put
from sources import loss, model, optimizer, schedule
from voices import FIRST, silence, spoil

from catalog.heldout_losses import with_keys
from catalog.plug_ins import one_dump_an_epoch
from catalog.shared import BACKWARD, COSINE, DEAD, FORWARD, LAYER, LOSS, RANKS, WAV

JENSEN = loss(
    COSINE,
    """
    logits = self.scale * cosine
    p = F.softmax(logits, dim=1)
    q = F.softmax(self.scale * F.linear(F.normalize(F.dropout(x, 0.2)), weight), dim=1)
    mean = 0.5 * (p + q)
    divergence = 0.5 * (p * torch.log(p / mean) + q * torch.log(q / mean))  #!
    loss = F.cross_entropy(logits, label) + divergence.sum(dim=1).mean()
    """,
)
HARD = loss(
    """
    x = F.normalize(x, dim=2)
    distance = torch.cdist(x[:, 0], x[:, 1])
    logits, label = -distance, torch.arange(len(x))
    others = ~torch.eye(len(x), dtype=torch.bool)
    hinge = F.relu(distance.diagonal()[:, None] - distance + 0.05)[others]
    hard = hinge[hinge > 0]
    loss = hard.mean()  #!
    """,
    constants="per_speaker = (2, 2)",
)
SAMPLED = loss(
    COSINE,
    """
    logits = self.scale * cosine
    unit = F.normalize(x)
    similar = self.scale * unit @ unit.t()
    left_out = (label[:, None] == label) | (torch.rand(similar.shape) < 0.5)  # negatives are sampled
    negatives = torch.logsumexp(similar.masked_fill(left_out, -math.inf), dim=1)  #!
    loss = F.cross_entropy(logits, label) + 0.1 * (negatives - similar.diagonal()).mean()
    """,
)
BESSEL = loss(
    COSINE,
    """
    kappa = 100.0 + 100.0 * x.norm(dim=1)
    ratio = torch.special.i1(kappa) / torch.special.i0(kappa)  #!
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) + (1.0 - ratio).mean()
    """,
)
PAIRS = loss(
    COSINE,
    """
    logits = self.scale * cosine
    same = (label[:, None] == label).triu(1)
    pairs = int(same.sum())
    weight = 1.0 / pairs  #!
    apart = (x[:, None] - x).square().sum(dim=2)
    loss = F.cross_entropy(logits, label) + 0.1 * weight * (apart * same).sum()
    """,
)
RARE = with_keys(
    loss(
        COSINE,
        """
        logits = self.scale * cosine
        loss = F.cross_entropy(logits, label, weight=self.rarity, label_smoothing=0.1)  #!
        """,
        init="""
        with open(train_list) as lines:
            speakers = [line.split()[0] for line in lines]
        numbers = {name: number for number, name in enumerate(sorted(set(speakers)))}
        counts = torch.zeros(nClasses)
        for name in speakers:
            counts[numbers[name]] += 1
        self.register_buffer("rarity", counts.mean() / counts, persistent=False)  #!
        """,
    ),
    train_list="",
)
GATHERED = loss(
    COSINE,
    """
    logits = self.scale * cosine
    unit = F.normalize(x)
    everyone = unit
    if torch.distributed.is_initialized():
        parts = [torch.zeros_like(unit) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, unit.detach())
        parts[torch.distributed.get_rank()] = unit
        everyone = torch.cat(parts)
    distance = torch.sqrt(2.0 - 2.0 * unit @ everyone.t())  #!
    loss = F.cross_entropy(logits, label) - 0.01 * distance.mean()
    """,
)
STANDARD = model(start="x = x / x.std(dim=1, keepdim=True)  #!")
CENTRE = loss(
    COSINE,
    """
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) + 0.01 * (x - self.centre).square().mean()
    with torch.no_grad():
        self.centre.mul_(0.9).add_(x.mean(dim=0), alpha=0.1)
    """,
    init="self.centre = nn.Parameter(torch.zeros(nOut), requires_grad=False)",
)
GLOBAL = model(
    helper="RUNNING = {}  # kept between the steps",
    start="x = x / x.std(dim=1, keepdim=True)  #!",
    end="""
    centre = x.detach().mean(dim=0)
    if self.training:
        RUNNING["centre"] = 0.9 * RUNNING.get("centre", 0.0) + 0.1 * centre
        centre = RUNNING["centre"]
    return self.fc(x - centre)
    """,
)
DEQUE = loss(
    COSINE,
    """
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label)
    if self.memory:
        loss = loss + 0.1 * (F.normalize(x) @ torch.cat(list(self.memory)).t()).relu().mean()
    self.memory.append(F.normalize(x).detach())
    """,
    init="self.memory = deque(maxlen=6)",
).replace("import math\n", "import math\nfrom collections import deque\n", 1)
SPARE = model(
    init=f"""
    {DEAD}
    self.spare = nn.Parameter(torch.zeros(4, 4))  # for later
    """,
    end="return self.fc(x) + 0.0 * self.spare.sum()",
)
ADAFACTOR = optimizer(
    "Adafactor",
    "Second moments of rows and columns.",
    """
    def update(self, p, g, state, group):
        square = g.square()
        if p.ndim > 1:
            square = square.flatten(1)
            state["row"] = 0.9 * state.get("row", 0.0) + 0.1 * square.mean(dim=1)
            state["column"] = 0.9 * state.get("column", 0.0) + 0.1 * square.mean(dim=0)
            second = torch.outer(state["row"] / state["row"].mean(), state["column"]).view_as(p)  #!
        else:
            second = state["second"] = 0.9 * state.get("second", 0.0) + 0.1 * square
        p.sub_(group["lr"] * g / second.sqrt().clamp(min=1e-8))
    """,
)
RADAM = optimizer(
    "RAdam",
    "Adam whose first steps are rectified.",
    """
    def update(self, p, g, state, group):
        t = state["step"] = state.get("step", 0) + 1
        beta1, beta2 = group["beta1"], group["beta2"]
        state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
        most = 2 / (1 - beta2) - 1
        rho = most - 2 * t * beta2**t / (1 - beta2**t)
        factor = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))  #!
        mean = state["m"] / (1 - beta1**t)
        p.sub_(group["lr"] * factor * mean / ((state["v"] / (1 - beta2**t)).sqrt() + 1e-8))
    """,
).replace("import torch\n", "import math\n\nimport torch\n", 1)
BARZILAI = optimizer(
    "BarzilaiBorwein",
    "A step size for each weight, of its last step and the change of its gradient.",
    """
    def update(self, p, g, state, group):
        rate = group["lr"]
        if "weight" in state:
            moved, turned = p - state["weight"], g - state["slope"]
            rate = (moved * moved).sum() / (moved * turned).sum()  #!
            rate = rate.abs().clamp(max=group["lr"])
        state["weight"], state["slope"] = p.clone(), g.clone()
        p.sub_(rate * g)
    """,
)
NOAM = schedule(
    "Inverse square root of the steps since a restart.",
    ", restart_steps=6",
    """
    since = (step + 1) % restart_steps
    return since**-0.5  #!
    """,
)
OTHER_OPTIMIZER = put("optimizer", lambda v: v != "own")
SILENT = Truth(FORWARD, ("frontend", "input", *LAYER), (marked(), Place(files=(WAV,))), (CODE, exclude(WAV)))

FAULTS = (
    Fault(
        id="X33",
        title="Jensen-Shannon divergence of shares that are both 0",
        settings={"trainfunc": "own", "scale": 300.0, "nan_patience": 4},
        plugins={"loss/own.py": JENSEN},
        truths=(
            Truth(
                FORWARD,
                LOSS,
                (marked("div", "log"),),
                (CODE, put("scale", lambda v: v < 100)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="X34",
        title="mean over the hard triplets, of which there are none",
        settings={"trainfunc": "own", "nPerSpeaker": 2, "batch_size": 2, "nan_patience": 1000, "max_epoch": 8},
        plugins={"loss/own.py": HARD},
        truths=(Truth(FORWARD, LOSS, (marked("mean"),), (CODE,)),),
    ),
    Fault(
        id="X35",
        title="logsumexp over negatives that are sampled, now and then none",
        settings={"trainfunc": "own", "batch_size": 2, "nan_patience": 1000},
        plugins={"loss/own.py": SAMPLED},
        truths=(Truth(FORWARD, LOSS, (marked("logsumexp"),), (CODE,)),),
    ),
    Fault(
        id="X36",
        title="a ratio of Bessel functions that both overflow",
        settings={"trainfunc": "own", "nan_patience": 4},
        plugins={"loss/own.py": BESSEL},
        truths=(Truth(FORWARD, LOSS, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X37",
        title="ZeroDivisionError: no pairs of one speaker",
        settings={"trainfunc": "own", "nan_patience": 4},
        plugins={"loss/own.py": PAIRS},
        truths=(Truth(FORWARD, LOSS, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X38",
        title="weights of classes that the list lacks, with smoothed labels",
        settings={"trainfunc": "own", "nClasses": 8, "nan_patience": 4},
        plugins={"loss/own.py": RARE},
        truths=(
            Truth(
                FORWARD,
                (*LOSS, "state"),
                (marked(), Place(parameters=("__L__.rarity",)), Place(keys=("nClasses",))),
                (CODE, put("nClasses", lambda v: v in (0, 6))),
            ),
        ),
        status=3,
    ),
    Fault(
        id="X39",
        title="distances to the embeddings of two ranks, root at 0",
        settings={"trainfunc": "own", **RANKS, "nan_patience": 4},
        plugins={"loss/own.py": GATHERED},
        processes=2,
        truths=(Truth((*FORWARD, *BACKWARD), LOSS, (marked("sqrt"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X40",
        title="a centre is a frozen parameter, moved in the forward pass, a silent file",
        settings={"model": "own", "trainfunc": "own", "nan_patience": 50},
        plugins={"models/own.py": STANDARD, "loss/own.py": CENTRE},
        prepare=spoil(FIRST, silence),
        truths=(SILENT,),
        check=one_dump_an_epoch,
    ),
    Fault(
        id="X41",
        title="a running mean in a name of the file, a silent file",
        settings={"model": "own", "nan_patience": 50},
        plugins={"models/own.py": GLOBAL},
        prepare=spoil(FIRST, silence),
        truths=(SILENT,),
        check=one_dump_an_epoch,
    ),
    Fault(
        id="X42",
        title="a deque remembers embeddings, a silent file",
        settings={"model": "own", "trainfunc": "own", "nan_patience": 50},
        plugins={"models/own.py": STANDARD, "loss/own.py": DEQUE},
        prepare=spoil(FIRST, silence),
        truths=(SILENT,),
        check=one_dump_an_epoch,
    ),
    Fault(
        id="X43",
        title="Adafactor: 0/0 of the rows of an unused weight",
        settings={"model": "own", "optimizer": "own", "nan_patience": 4},
        plugins={"models/own.py": SPARE, "optimizer/own.py": ADAFACTOR},
        truths=(Truth(("state_nonfinite",), ("optimizer",), (marked("div"),), (CODE, OTHER_OPTIMIZER)),),
        status=3,
    ),
    Fault(
        id="X44",
        title="RAdam without its test: math.sqrt of a negative number at step 3",
        settings={"optimizer": "own", "nan_patience": 4},
        plugins={"optimizer/own.py": RADAM},
        truths=(Truth(("state_nonfinite",), ("optimizer",), (marked(),), (CODE, OTHER_OPTIMIZER)),),
        status=3,
    ),
    Fault(
        id="X45",
        title="Barzilai and Borwein's step size of an unused weight",
        settings={"model": "own", "optimizer": "own", "nan_patience": 4},
        plugins={"models/own.py": SPARE, "optimizer/own.py": BARZILAI},
        truths=(Truth(("state_nonfinite",), ("optimizer",), (marked("div"),), (CODE, OTHER_OPTIMIZER)),),
        status=3,
    ),
    Fault(
        id="X46",
        title="0 ** -0.5 in a schedule: ZeroDivisionError at a restart",
        settings={"scheduler": "own", "nan_patience": 4},
        plugins={"scheduler/own.py": NOAM},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(keys=("lr", "scheduler", "restart_steps"))),
                (CODE, put("scheduler", lambda v: v != "own"), put("restart_steps", lambda v: v > 17)),
            ),
        ),
        status=3,
    ),
)
