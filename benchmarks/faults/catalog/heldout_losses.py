"""Loss heads."""

from fault import CODE, Fault, Place, Truth, marked, put
from sources import loss, model

from catalog.shared import ANY, BACKWARD, COSINE, FORWARD, LOSS, duplicate

TWO_OF_A_SPEAKER = "per_speaker = (2, 2)"


def with_keys(source: str, **keys) -> str:
    """A loss that takes these keys too, and keeps them."""
    words = "".join(f", {name}={value!r}" for name, value in keys.items())
    kept = "".join(f"        self.{name} = {name}\n" for name in keys)
    source = source.replace(", scale=30.0, **kwargs", f", scale=30.0{words}, **kwargs")
    return source.replace("        self.margin = margin\n", f"        self.margin = margin\n{kept}")


LEAVE_ONE_OUT = loss(
    """
    x = x.unsqueeze(1) if x.dim() == 2 else x
    speakers, count, size = x.shape
    total = x.sum(dim=1, keepdim=True)
    others = (total - x) / (count - 1)  #!
    centres = F.normalize(total.squeeze(1), dim=1)
    own = F.cosine_similarity(x, others, dim=2)
    logits = 10.0 * F.normalize(x, dim=2) @ centres.t()
    label = torch.arange(speakers)
    picked = F.one_hot(label, speakers).bool().unsqueeze(1)
    logits = torch.where(picked, 10.0 * own.unsqueeze(2), logits).mean(dim=1)
    loss = F.cross_entropy(logits, label)
    """,
    constants='"""GE2E: each utterance against the centroid of the others."""',
)
DISTANCES = loss(
    """
    points = x.reshape(-1, x.shape[-1])
    label = torch.arange(len(x)).repeat_interleave(x.shape[1])
    squares = points.pow(2).sum(dim=1)
    distance = squares[:, None] + squares[None, :] - 2.0 * points @ points.t()
    distance = distance ** 0.5  #!
    same = label[:, None] == label[None, :]
    hardest_positive = (distance * same).amax(dim=1)
    hardest_negative = (distance + 1e4 * same).amin(dim=1)
    loss = F.relu(hardest_positive - hardest_negative + self.margin).mean()
    logits = -distance.detach()
    """,
    constants=TWO_OF_A_SPEAKER,
)
TEMPERATURE = loss(
    COSINE,
    """
    logits = cosine / self.temperature  #!
    loss = F.cross_entropy(logits, label)
    """,
    init="self.temperature = 0.5",
    more='''

    def set_epoch(self, epoch):
        """Anneal the temperature: soft in the first epoch, sharp in the second."""
        self.temperature = 0.5 * max(2.0 - epoch, 0.0)  #!
    ''',
)
FOCAL = loss(
    COSINE,
    """
    logits = self.scale * cosine + 40.0 * F.one_hot(label, self.classes) * (label == 2)[:, None]
    log_p = F.log_softmax(logits, dim=1).gather(1, label.unsqueeze(1)).squeeze(1)
    p = log_p.exp()
    focus = (1.0 - p).pow(self.gamma)  #!
    loss = -(focus * log_p).mean()
    """,
)
SMOOTHING = loss(
    COSINE,
    """
    logits = self.scale * cosine
    target = torch.full_like(logits, self.smoothing / (self.classes - 1))
    target.scatter_(1, label[:, None], 1.0 - self.smoothing)
    entropy = target * torch.log(target)  #!
    loss = (entropy - target * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
    """,
)
CENTRE = loss(
    "logits = F.linear(x, self.weight)",
    """
    counts = torch.bincount(label, minlength=self.classes)
    sums = torch.zeros(self.classes, x.shape[1]).index_add(0, label, x)
    means = sums / counts[:, None]  #!
    within = (x - means[label]).square().sum(dim=1).mean()
    between = torch.pdist(means).mean()
    loss = F.cross_entropy(logits, label) + 0.01 * within - 0.001 * between
    """,
)
MAG_FACE = loss(
    COSINE,
    """
    norms = x.norm(dim=1).clamp(self.lower_norm, self.upper_norm)
    share = (norms - self.lower_norm) / (self.upper_norm - self.lower_norm)  #!
    margins = 0.1 + (self.margin - 0.1) * share
    target = cosine.gather(1, label[:, None]).squeeze(1).clamp(-0.999, 0.999)
    shifted = torch.cos(torch.acos(target) + margins)
    logits = self.scale * cosine.scatter(1, label[:, None], shifted[:, None])
    loss = F.cross_entropy(logits, label)
    """,
    init="""
    self.register_buffer("low", torch.tensor(float(lower_norm)))
    self.lower_norm = self.low
    """,
)
SINKHORN = loss(
    COSINE,
    """
    with torch.no_grad():
        plan = torch.exp(cosine / self.epsilon)  #!
        for _ in range(3):
            plan = plan / plan.sum(dim=0, keepdim=True)
            plan = plan / plan.sum(dim=1, keepdim=True)
    logits = self.scale * cosine
    guide = -(plan * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
    loss = F.cross_entropy(logits, label) + 0.1 * guide
    """,
)
BARLOW = loss(
    """
    first, second = ((view - view.mean(0)) / view.std(0) for view in x.unbind(1))  #!
    correlation = first.t() @ second / len(x)
    off = correlation - torch.diag(correlation.diagonal())
    label = torch.arange(len(x))
    logits = x[:, 0] @ x[:, 1].t()
    loss = (1 - correlation.diagonal()).square().sum() + 0.005 * off.square().sum() + F.cross_entropy(logits, label)
    """,
    constants=TWO_OF_A_SPEAKER,
)
DEAD_OUTPUT = model(init="self.fc.weight.data[5] = 0.0  # a pruned output", end="return self.fc(x)")
HYPERBOLIC = loss(
    """
    ball = 0.9 * x / (1.0 + x.norm(dim=2, keepdim=True))
    first, second = ball[:, None, 0], ball[None, :, 1]
    gap = (first - second).square().sum(dim=2)
    outside = (1 - first.square().sum(dim=2)) * (1 - second.square().sum(dim=2))
    distance = torch.acosh(1 + 2 * gap / outside)  #!
    logits, label = -distance, torch.arange(len(x))
    loss = F.cross_entropy(logits, label)
    """,
    constants=TWO_OF_A_SPEAKER,
)
LOUD_LOSS = loss(
    COSINE,
    """
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) * self.loss_weight  #!
    """,
)
BINARY = loss(
    COSINE,
    """
    logits = self.scale * (cosine - 0.2)
    wanted = F.one_hot(label, self.classes).to(x)
    p = 1 / (1 + torch.exp(-logits))
    losses = wanted * p.log() + (1 - wanted) * (1 - p).log()  #!
    loss = -losses.sum(dim=1).mean()
    """,
)
BATCH_SPREAD = loss(
    COSINE,
    """
    norms = x.norm(dim=1).detach()
    quality = ((norms - norms.mean()) / (self.spread + 1e-3)).clamp(-1, 1)
    logits = self.scale * (cosine - self.margin * quality[:, None] * F.one_hot(label, self.classes))
    right = norms[logits.argmax(dim=1) == label]
    self.spread.mul_(0.9).add_(0.1 * right.std())  #!
    loss = F.cross_entropy(logits, label)
    """,
    init='self.register_buffer("spread", torch.ones(()))',
)
PAIR_RUN = {"nPerSpeaker": 2, "batch_size": 3}

FAULTS = (
    Fault(
        id="H21",
        title="GE2E with one utterance of a speaker",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": LEAVE_ONE_OUT},
        truths=(Truth(FORWARD, LOSS, (marked("div"),), (CODE, put("nPerSpeaker", lambda v: v >= 2))),),
        status=3,
    ),
    Fault(
        id="H22",
        title="distance matrix by squares, its diagonal",
        settings={"trainfunc": "unseen", "nan_patience": 4, **PAIR_RUN},
        plugins={"loss/unseen.py": DISTANCES},
        truths=(Truth(ANY, LOSS, (marked("pow", "sqrt"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H23",
        title="a temperature is annealed to 0",
        settings={"trainfunc": "unseen", "nan_patience": 1000},
        plugins={"loss/unseen.py": TEMPERATURE},
        truths=(Truth(FORWARD, LOSS, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H24",
        title="focal loss, gamma 0.5, sure rows",
        settings={"trainfunc": "unseen", "nan_patience": 1000},
        plugins={"loss/unseen.py": with_keys(FOCAL, gamma=0.5)},
        truths=(
            Truth(BACKWARD, LOSS, (marked("pow", "rsub", "sub"),), (CODE, put("gamma", lambda v: v >= 1 or v == 0))),
        ),
    ),
    Fault(
        id="H25",
        title="smoothed targets by hand, smoothing 0",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": with_keys(SMOOTHING, smoothing=0.0)},
        truths=(Truth(FORWARD, LOSS, (marked("log", "mul"),), (CODE, put("smoothing", lambda v: 0 < v < 1))),),
        status=3,
    ),
    Fault(
        id="H26",
        title="means of classes that the batch lacks",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": CENTRE},
        truths=(Truth(ANY, LOSS, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="H27",
        title="MagFace with equal norm bounds",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": with_keys(MAG_FACE, lower_norm=10.0, upper_norm=10.0)},
        truths=(
            Truth(
                FORWARD,
                LOSS,
                (marked("div"), Place(keys=("upper_norm", "lower_norm"))),
                (CODE, put("upper_norm", lambda v: v != 10), put("lower_norm", lambda v: v != 10)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H28",
        title="Sinkhorn, epsilon 0.005",
        settings={"trainfunc": "unseen", "nan_patience": 1000},
        plugins={"loss/unseen.py": with_keys(SINKHORN, epsilon=0.005)},
        truths=(
            Truth(
                FORWARD,
                LOSS,
                (marked("exp", "div"), Place(keys=("epsilon",))),
                (CODE, put("epsilon", lambda v: v >= 0.0115)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H29",
        title="Barlow twins: an output of the net is dead",
        settings={"trainfunc": "unseen", "nan_patience": 4, **PAIR_RUN, "model": "unseen"},
        plugins={"loss/unseen.py": BARLOW, "models/unseen.py": DEAD_OUTPUT},
        truths=(
            Truth(
                ANY,
                ("loss", "model_forward", "model_backward"),
                (marked("div", "std"), Place(parameters=("__S__.fc.weight", "__S__.fc.bias"))),
                (CODE,),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H30",
        title="hyperbolic distance of duplicates",
        settings={"trainfunc": "unseen", "nan_patience": 1000, **PAIR_RUN},
        plugins={"loss/unseen.py": HYPERBOLIC},
        prepare=duplicate,
        truths=(Truth(BACKWARD, LOSS, (marked("acosh"),), (CODE,)),),
    ),
    Fault(
        id="H31",
        title="a loss weight of 1e38",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": with_keys(LOUD_LOSS, loss_weight=1e38)},
        truths=(
            Truth(
                ("grad_norm_overflow", "grad_nonfinite", "loss_nonfinite", "state_nonfinite"),
                LOSS,
                (marked("mul"), Place(keys=("loss_weight",))),
                (CODE, put("loss_weight", lambda v: 0 < v < 1e20)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="H32",
        title="binary cross-entropy by hand, scale 64",
        settings={"trainfunc": "unseen", "nan_patience": 1000, "scale": 64.0},
        plugins={"loss/unseen.py": BINARY},
        truths=(Truth(ANY, LOSS, (marked("log", "mul"),), (CODE, put("scale", lambda v: 0 < v <= 20))),),
        status=3,
    ),
    Fault(
        id="H33",
        title="the loss keeps a deviation of one row",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": BATCH_SPREAD},
        truths=(
            Truth(
                (*ANY, "state_nonfinite"), ("loss", "state"), (marked(), Place(parameters=("__L__.spread",))), (CODE,)
            ),
        ),
        status=3,
    ),
)
