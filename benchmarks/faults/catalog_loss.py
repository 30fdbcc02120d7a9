"""Faults of loss heads: F21, F24, F30 to F36 and F44."""

import voices
from fault import CODE, FULL_PRECISION, Fault, Place, Truth, put
from sources import loss

BAD = {"trainfunc": "bad", "nan_patience": 1000}
HALF = {"mixedprec": True, "amp_dtype": "float16"}
FORWARD, BACKWARD = ("loss_nonfinite",), ("grad_nonfinite",)

COSINE = """
weight = F.normalize(self.weight)
cosine = F.linear(F.normalize(x), weight)
"""
# Class centres taken from the first embeddings (Qi et al. 2018): each embedding is parallel to its centre once.
IMPRINT = """
if not self.imprinted:
    self.weight.data[label] = F.normalize(x.detach())
    self.imprinted = True
"""
AAM = """
target = cosine[torch.arange(len(label)), label]
sine = torch.sqrt({inside})  #!
shifted = target * math.cos(self.margin) - sine * math.sin(self.margin)
logits = cosine.index_put((torch.arange(len(label)), label), shifted) * self.scale
loss = F.cross_entropy(logits, label)
"""
IMPRINTED = "self.imprinted = False"
CLAMPED = loss(IMPRINT, COSINE, AAM.format(inside="(1.0 - target.square()).clamp(0, 1)"), init=IMPRINTED)
UNCLAMPED = loss(IMPRINT, COSINE, AAM.format(inside="1.0 - target.square()"), init=IMPRINTED)
ARC = loss(
    IMPRINT,
    COSINE,
    """
    angle = torch.acos(cosine.clamp(-1.0, 1.0))  #!
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


def one_line(id, title, reasons, causes, ops, source, more_fixes=(), every=False, **more) -> Fault:
    """A fault of a marked line of loss/bad.py; ``every`` batch has it, or only some."""
    settings = {**BAD, **({"nan_patience": 4} if every else {}), **more.pop("settings", {})}
    more |= {"status": 3} if every else {}
    truth = Truth(reasons, causes, (Place(code=True, ops=ops),), (CODE, *more_fixes))
    return Fault(id, title, (truth,), settings, {"loss/bad.py": source}, **more)


def below(limit: float):
    """A value of at most ``limit``."""
    return lambda value: 0 < value <= limit


def duplicate(workspace):
    """Speaker 3 has one recording under every name, as long as a crop, so that a pair of it is twice the same."""
    for number in range(5):
        name = f"train003/session{number % 4}/{number:05d}"
        source, rate = voices.soundfile.read(workspace.data / "wav" / "train003/session0/00000.flac")
        voices.soundfile.write(workspace.data / "wav" / f"{name}.flac", source[:9840], rate)


LOSS, PRECISION = ("loss",), ("precision",)
FAULTS = (
    one_line(
        *("F21", "log of a softmax by hand", FORWARD, LOSS, ("log", "softmax"), HAND_LOG),
        more_fixes=(put("scale", below(90)),),
        settings={"scale": 400.0},
    ),
    one_line("F24", "acos at a cosine of 1", BACKWARD, LOSS, ("acos",), ARC),
    one_line("F30", "AAM sine clamped to [0, 1], parallel class centre", BACKWARD, LOSS, ("sqrt",), CLAMPED),
    one_line("F31", "AAM sine not clamped", (*FORWARD, *BACKWARD), LOSS, ("sqrt",), UNCLAMPED),
    one_line(
        *("F32", "scale 1e6 in fp16", FORWARD, PRECISION, ("mul",), SCALED),
        *((*FULL_PRECISION, put("scale", below(6.5e4))), True),
        settings={**HALF, "scale": 1e6},
    ),
    Fault(
        *("F33", "scale 1e39 in the YAML file"),
        (Truth(FORWARD, LOSS, (Place(keys=("scale",)),), (put("scale", below(1e6)),)),),
        {"scale": 1e39, "nan_patience": 4},
        status=3,
    ),
    one_line("F34", "margin schedule 0/0 at the start of epoch 2", FORWARD, LOSS, ("div", "mul"), MARGIN_RAMP),
    one_line(
        *("F35", "log(1 + exp) beyond 88", FORWARD, LOSS, ("exp",), SOFTPLUS),
        *((put("scale", below(88)),), True),
        settings={"scale": 400.0},
    ),
    one_line(
        *("F35b", "log(1 + exp) beyond 11 in fp16", FORWARD, PRECISION, ("exp",), SOFTPLUS),
        *((*FULL_PRECISION, put("scale", below(11))), True),
        settings={**HALF, "scale": 60.0},
    ),
    one_line(
        *("F36", "pair distance of duplicates", BACKWARD, LOSS, ("sqrt",), PAIRS),
        settings={"nPerSpeaker": 2},
        prepare=duplicate,
    ),
    one_line(
        *("F44", "Inf gradient before the clipping", BACKWARD, LOSS, ("sqrt",), INFINITE_NORM),
        settings={"grad_clip": 1.0},
    ),
)
