"""Held-out faults of loss heads in fp32: H21 to H33."""

from catalog_heldout_features import BACKWARD, FORWARD
from catalog_loss import COSINE, duplicate
from fault import CODE, Fault, Place, Truth, put
from sources import loss, model

UNSEEN = {"trainfunc": "unseen"}
PAIRS = "per_speaker = (2, 2)"
ANY, LOSS = (*FORWARD, *BACKWARD), ("loss",)


def with_keys(source: str, **keys) -> str:
    """A loss that takes these keys too, and keeps them."""
    words = "".join(f", {name}={value!r}" for name, value in keys.items())
    kept = "".join(f"        self.{name} = {name}\n" for name in keys)
    source = source.replace(", scale=30.0, **kwargs", f", scale=30.0{words}, **kwargs")
    return source.replace("        self.margin = margin\n", f"        self.margin = margin\n{kept}")


def of_head(id, title, reasons, ops, source, every=False, fixes=(), causes=LOSS, places=(), **more) -> Fault:
    """A fault of a marked line of loss/unseen.py."""
    settings = {**UNSEEN, "nan_patience": 4 if every else 1000, **more.pop("settings", {})}
    plugins = {"loss/unseen.py": source, **more.pop("plugins", {})}
    more |= {"status": 3} if every else {}
    truth = Truth(reasons, causes, (Place(code=True, ops=ops), *places), (CODE, *fixes))
    return Fault(id, title, (truth,), settings, plugins, **more)


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
    constants=PAIRS,
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
    constants=PAIRS,
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
    constants=PAIRS,
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
    of_head(
        *("H21", "GE2E with one utterance of a speaker", FORWARD, ("div",), LEAVE_ONE_OUT),
        every=True,
        fixes=(put("nPerSpeaker", lambda v: v >= 2),),
    ),
    of_head(
        *("H22", "distance matrix by squares, its diagonal", ANY, ("pow", "sqrt"), DISTANCES),
        every=True,
        settings=PAIR_RUN,
    ),
    of_head("H23", "a temperature is annealed to 0", FORWARD, ("div",), TEMPERATURE),
    of_head(
        *("H24", "focal loss, gamma 0.5, sure rows", BACKWARD, ("pow", "rsub", "sub"), with_keys(FOCAL, gamma=0.5)),
        fixes=(put("gamma", lambda v: v >= 1 or v == 0),),
    ),
    of_head(
        *("H25", "smoothed targets by hand, smoothing 0", FORWARD, ("log", "mul"), with_keys(SMOOTHING, smoothing=0.0)),
        every=True,
        fixes=(put("smoothing", lambda v: 0 < v < 1),),
    ),
    of_head("H26", "means of classes that the batch lacks", ANY, ("div",), CENTRE, every=True),
    of_head(
        "H27",
        "MagFace with equal norm bounds",
        FORWARD,
        ("div",),
        with_keys(MAG_FACE, lower_norm=10.0, upper_norm=10.0),
        every=True,
        fixes=(put("upper_norm", lambda v: v != 10), put("lower_norm", lambda v: v != 10)),
        places=(Place(keys=("upper_norm", "lower_norm")),),
    ),
    of_head(
        "H28",
        "Sinkhorn, epsilon 0.005",
        FORWARD,
        ("exp", "div"),
        with_keys(SINKHORN, epsilon=0.005),
        fixes=(put("epsilon", lambda v: v >= 0.0115),),
        places=(Place(keys=("epsilon",)),),
    ),
    of_head(
        *("H29", "Barlow twins: an output of the net is dead", ANY, ("div", "std"), BARLOW),
        every=True,
        causes=("loss", "model_forward", "model_backward"),
        places=(Place(parameters=("__S__.fc.weight", "__S__.fc.bias")),),
        settings={**PAIR_RUN, "model": "unseen"},
        plugins={"models/unseen.py": DEAD_OUTPUT},
    ),
    of_head(
        *("H30", "hyperbolic distance of duplicates", BACKWARD, ("acosh",), HYPERBOLIC),
        settings=PAIR_RUN,
        prepare=duplicate,
    ),
    of_head(
        "H31",
        "a loss weight of 1e38",
        ("grad_norm_overflow", "grad_nonfinite", "loss_nonfinite", "state_nonfinite"),
        ("mul",),
        with_keys(LOUD_LOSS, loss_weight=1e38),
        every=True,
        fixes=(put("loss_weight", lambda v: 0 < v < 1e20),),
        places=(Place(keys=("loss_weight",)),),
    ),
    of_head(
        *("H32", "binary cross-entropy by hand, scale 64", ANY, ("log", "mul"), BINARY),
        settings={"scale": 64.0},
        fixes=(put("scale", lambda v: 0 < v <= 20),),
    ),
    of_head(
        *("H33", "the loss keeps a deviation of one row", (*ANY, "state_nonfinite"), (), BATCH_SPREAD),
        causes=("loss", "state"),
        every=True,
        places=(Place(parameters=("__L__.spread",)),),
    ),
)
