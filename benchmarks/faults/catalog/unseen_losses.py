"""More loss heads: sparse graphs, temperatures, targets under no_grad, torch.func."""

from fault import CODE, Fault, Place, Truth, marked, put
from sources import loss

from catalog.heldout_losses import with_keys
from catalog.shared import BACKWARD, COSINE, FORWARD, LOSS

NEIGHBOURS = loss(
    COSINE,
    """
    same = (label[:, None] == label[None, :]).to(x.dtype)
    graph = (same - torch.eye(len(x))).to_sparse()  # who else in the batch is of my speaker
    degree = torch.sparse.sum(graph, dim=1).to_dense()
    smooth = torch.sparse.mm(graph, x) / degree[:, None]  #!
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) + 0.1 * (x - smooth).square().mean()
    """,
)
SUP_CON = loss(
    """
    points = F.normalize(x.reshape(-1, x.shape[-1]))
    logits = points @ self.weight.t()
    similarity = points @ points.t() / 0.07
    others = ~torch.eye(len(points), dtype=torch.bool)
    positives = (label[:, None] == label[None, :]) & others
    log_p = similarity - similarity.masked_fill(~others, -math.inf).logsumexp(dim=1, keepdim=True)
    per_anchor = -(log_p * positives).sum(dim=1)
    per_anchor = per_anchor.div(  #!
        positives.sum(dim=1)  #!
    )
    loss = per_anchor.mean()
    """,
)
INFO_NCE = with_keys(
    loss(
        """
        anchors, positives = (F.normalize(part.squeeze(1)) for part in x.split(1, dim=1))
        label = torch.arange(len(x))
        logits = anchors @ positives.t()
        e = torch.exp(logits / self.temperature)  #!
        loss = -torch.log(e.diagonal() / e.sum(dim=1)).mean()  #!
        """,
        constants="per_speaker = (2, 2)",
    ),
    temperature=0.01,
)
UNCERTAINTY = loss(
    COSINE,
    """
    own = cosine.gather(1, label[:, None]).squeeze(1)
    logits = self.scale * cosine
    tasks = torch.stack([F.cross_entropy(logits, label), F.relu(-1.5 - own).mean()])  # the second is learnt
    precision = 0.5 / self.sigma.square()
    loss = (precision * tasks + torch.log(self.sigma)).sum()  #!
    """,
    init="self.sigma = nn.Parameter(torch.tensor([1.0, 0.045]))",
)
RUNNING_CENTRES = loss(
    COSINE,
    """
    with torch.no_grad():
        targets = self.centres[label]
        targets = targets / torch.linalg.norm(targets, dim=1, keepdim=True)  #!
        self.centres[label] = torch.lerp(self.centres[label], x, 0.1)
    logits = self.scale * cosine
    pull = 1.0 - (F.normalize(x) * targets).sum(dim=1)
    loss = F.cross_entropy(logits, label) + 0.1 * pull.mean()
    """,
    init='self.register_buffer("centres", torch.zeros(nClasses, nOut))',
)
SPREAD_ANGLES = loss(
    COSINE,
    """
    centres = F.normalize(self.weight)
    between = centres @ centres.t()
    between[between > 1.0] = 1.0  # rounding
    angles = torch.acos(between)  #!
    angles = angles * (1.0 - torch.eye(self.classes))
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) - 0.1 * angles.sum() / self.classes**2
    """,
)
VARIANCES = loss(
    COSINE,
    """
    own = cosine.gather(1, label.view(-1, 1)).flatten()
    spread = [
        own[label == speaker].var()  #!
        for speaker in label.unique()
    ]
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) + torch.stack(spread).mean()
    """,
)
PENALTY = loss(
    COSINE,
    """
    def hinge(point, centre):
        return F.relu(-F.cosine_similarity(point, centre, dim=0))

    slopes = torch.func.vmap(torch.func.grad(hinge))(x, self.weight[label])  # (B, nOut)
    length = slopes.square().sum(dim=1).sqrt()  #!
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) + 0.1 * (length - 1.0).square().mean()
    """,
)
PAST_ITS_END = with_keys(
    loss(
        COSINE,
        """
        angle = torch.acos(cosine.clamp(-0.999, 0.999))
        target = torch.cos(angle + self.margin * F.one_hot(label, self.classes))  #!
        logits = self.scale * target
        loss = F.cross_entropy(logits, label)
        """,
        init="self.final_margin = margin",
        more='''

        def set_epoch(self, epoch):
            """Let the margin rise on a quarter of a circle."""
            left = 1.0 - (epoch - 1.0) / self.warm_epochs
            root = torch.tensor(left).pow(0.5).item()  #!
            self.margin = self.final_margin * (1.0 - root)  #!
        ''',
    ),
    warm_epochs=1.0,
)

FAULTS = (
    Fault(
        id="N25",
        title="sparse.mm over a graph, a row without neighbours",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": NEIGHBOURS},
        truths=(Truth(FORWARD, LOSS, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N26",
        title="SupCon, an anchor without positives",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": SUP_CON},
        truths=(Truth(FORWARD, LOSS, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N27",
        title="InfoNCE by hand at temperature 0.01",
        settings={"trainfunc": "unseen", "nPerSpeaker": 2, "nan_patience": 4},
        plugins={"loss/unseen.py": INFO_NCE},
        truths=(
            Truth(
                FORWARD,
                LOSS,
                (marked("exp", "div", "sum", "log"), Place(keys=("temperature",))),
                (CODE, put("temperature", lambda v: v >= 0.0125)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="N28",
        title="learned uncertainty of a task that costs nothing",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": UNCERTAINTY},
        truths=(Truth(FORWARD, LOSS, (marked("log"), Place(parameters=("__L__.sigma",))), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N29",
        title="running centres of 0 as targets, under no_grad",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": RUNNING_CENTRES},
        truths=(Truth(FORWARD, LOSS, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N30",
        title="angles between class centres, the diagonal times 0",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": SPREAD_ANGLES},
        truths=(Truth(BACKWARD, LOSS, (marked("acos"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N31",
        title="variance within each speaker, one utterance of some",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": VARIANCES},
        truths=(Truth(FORWARD, LOSS, (marked("var"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N32",
        title="gradient penalty with torch.func, a slope of 0",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": PENALTY},
        truths=(Truth(BACKWARD, LOSS, (marked("sqrt"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N33",
        title="a margin schedule goes on past its end",
        settings={"trainfunc": "unseen", "nan_patience": 4},
        plugins={"loss/unseen.py": PAST_ITS_END},
        truths=(
            Truth(
                FORWARD,
                LOSS,
                (marked(), Place(keys=("margin", "warm_epochs"))),
                (CODE, put("warm_epochs", lambda v: v >= 2)),
            ),
        ),
        status=3,
    ),
)
