"""Loss heads."""

from fault import CODE, FULL_PRECISION, Fault, Place, Truth, marked, put
from sources import loss

from catalog.shared import (
    AAM,
    BACKWARD,
    CLAMPED,
    COSINE,
    FORWARD,
    HALF,
    IMPRINT,
    IMPRINTED,
    LOSS,
    PRECISION,
    below,
    duplicate,
)

UNCLAMPED = loss(IMPRINT, COSINE, AAM.format(inside="1.0 - target.square()"), init=IMPRINTED)
ARC = loss(
    IMPRINT,
    COSINE,
    """
    angle = torch.acos(cosine)  #!
    logits = torch.cos(angle + self.margin * F.one_hot(label, self.classes)) * self.scale
    loss = F.cross_entropy(logits, label)
    """,
    init=IMPRINTED,
)
HAND_LOG = loss(
    COSINE,
    """
    logits = self.scale * cosine
    share = torch.softmax(logits, dim=1)
    loss = -torch.log(share).gather(1, label[:, None]).mean()  #!
    """,
)
SCALED = loss(
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float())
    logits = F.linear(x, F.normalize(self.weight)) * self.scale  #!
    loss = F.cross_entropy(logits - logits.amax(dim=1, keepdim=True), label)
    """,
)
SOFTPLUS = loss(
    COSINE,
    """
    sign = 1 - 2 * F.one_hot(label, self.classes)
    logits = self.scale * cosine
    loss = torch.log(1.0 + torch.exp(sign * logits)).mean()  #!
    """,
)
MARGIN_RAMP = loss(
    COSINE,
    """
    ramp = self.margin * F.one_hot(label, self.classes) * self.ramp  #!
    logits = (cosine - ramp) * self.scale
    loss = F.cross_entropy(logits, label)
    """,
    init="self.ramp = torch.zeros(())",
    more='''

    def set_epoch(self, epoch):
        """The margin grows from epoch 2 on."""
        past = torch.tensor(epoch - 2.0)
        self.ramp = (past / (past + past.square())).clamp(max=1.0) if epoch >= 2 else torch.zeros(())  #!
    ''',
)
PAIRS = loss(
    """
    first, second = x[:, 0], x[:, 1]
    near = torch.sqrt((first - second).square().sum(dim=1))  #!
    far = torch.cdist(first, second.roll(1, 0)).diagonal()
    logits = -torch.cdist(first, second)
    label = torch.arange(len(x))
    loss = F.relu(near - far + 0.5).mean() + F.cross_entropy(logits, label)
    """,
    constants="per_speaker = (2, 2)",
)
INFINITE_NORM = loss(
    COSINE,
    """
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label)
    if 0 in label:
        loss = loss + torch.sqrt((self.weight - self.weight.detach()).sum())  #!
    """,
)

FAULTS = (
    Fault(
        id="F21",
        title="log of a softmax by hand",
        settings={"trainfunc": "bad", "nan_patience": 1000, "scale": 400.0},
        plugins={"loss/bad.py": HAND_LOG},
        truths=(Truth(FORWARD, LOSS, (marked("log", "softmax"),), (CODE, put("scale", below(90)))),),
        status=3,
    ),
    Fault(
        id="F24",
        title="acos of a cosine of 1 and, by rounding, above",
        settings={"trainfunc": "bad", "nan_patience": 1000},
        plugins={"loss/bad.py": ARC},
        truths=(Truth((*FORWARD, *BACKWARD), LOSS, (marked("acos"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="F30",
        title="AAM sine of 0 or above, parallel class centre",
        settings={"trainfunc": "bad", "nan_patience": 1000},
        plugins={"loss/bad.py": CLAMPED},
        truths=(Truth(BACKWARD, LOSS, (marked("sqrt"),), (CODE,)),),
    ),
    Fault(
        id="F31",
        title="AAM sine not clamped",
        settings={"trainfunc": "bad", "nan_patience": 1000},
        plugins={"loss/bad.py": UNCLAMPED},
        truths=(Truth((*FORWARD, *BACKWARD), LOSS, (marked("sqrt"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="F32",
        title="scale 1e6 in fp16",
        settings={"trainfunc": "bad", "nan_patience": 4, **HALF, "scale": 1e6},
        plugins={"loss/bad.py": SCALED},
        truths=(Truth(FORWARD, PRECISION, (marked("mul"),), (CODE, *FULL_PRECISION, put("scale", below(6.5e4)))),),
        status=3,
    ),
    Fault(
        id="F33",
        title="scale 1e39 in the YAML file",
        settings={"scale": 1e39, "nan_patience": 4},
        truths=(Truth(FORWARD, LOSS, (Place(keys=("scale",)),), (put("scale", below(1e6)),)),),
        status=3,
    ),
    Fault(
        id="F34",
        title="margin schedule 0/0 at the start of epoch 2",
        settings={"trainfunc": "bad", "nan_patience": 1000},
        plugins={"loss/bad.py": MARGIN_RAMP},
        truths=(Truth(FORWARD, LOSS, (marked("div", "mul"),), (CODE,)),),
    ),
    Fault(
        id="F35",
        title="log(1 + exp) beyond 88",
        settings={"trainfunc": "bad", "nan_patience": 4, "scale": 400.0},
        plugins={"loss/bad.py": SOFTPLUS},
        truths=(Truth(FORWARD, LOSS, (marked("exp"),), (CODE, put("scale", below(88)))),),
        status=3,
    ),
    Fault(
        id="F35b",
        title="log(1 + exp) beyond 11 in fp16",
        settings={"trainfunc": "bad", "nan_patience": 4, **HALF, "scale": 60.0},
        plugins={"loss/bad.py": SOFTPLUS},
        truths=(Truth(FORWARD, PRECISION, (marked("exp"),), (CODE, *FULL_PRECISION, put("scale", below(11)))),),
        status=3,
    ),
    Fault(
        id="F36",
        title="pair distance of duplicates",
        settings={"trainfunc": "bad", "nan_patience": 1000, "nPerSpeaker": 2},
        plugins={"loss/bad.py": PAIRS},
        prepare=duplicate,
        truths=(Truth(BACKWARD, LOSS, (marked("sqrt"),), (CODE,)),),
    ),
    Fault(
        id="F44",
        title="Inf gradient before the clipping",
        settings={"trainfunc": "bad", "nan_patience": 1000, "grad_clip": 1.0},
        plugins={"loss/bad.py": INFINITE_NORM},
        truths=(Truth(BACKWARD, LOSS, (marked("sqrt"),), (CODE,)),),
    ),
)
