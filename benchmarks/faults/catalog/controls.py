"""Runs of which nothing may be said."""

import voices
from fault import Fault, Stage
from sources import loss, model, xvector
from voices import FIRST, NOISE, spoil
from workspace import ECAPA

from catalog.shared import COSINE, HALF, OVERFLOWS_ONCE, PLAIN, SGD, TRIAL, edit_last, gap, scale_found

SPIKE = loss(
    """
    logits = self.scale * F.linear(F.normalize(x), F.normalize(self.weight))
    loss = F.cross_entropy(logits, label) * (20.0 if self.spike else 1.0)
    """,
    init="self.spike = False",
    more='''

    def set_epoch(self, epoch):
        """One step costs twenty times as much."""
        self.spike = epoch == 2.0
    ''',
)
GATED = model(
    start="gate = (x.abs().amax(dim=1, keepdim=True) > 1e-4).float()",
    end="return self.fc(x) * gate",
)


def quiet_trial(workspace):
    """A silent test file."""
    path = workspace.data / "wav" / TRIAL
    samples, rate = voices.soundfile.read(path)
    voices.soundfile.write(path, samples * 0.0, rate)


def about_to_grow(state):
    """The next good step doubles the loss scale."""
    state["scaler_state_dict"]["_growth_tracker"] = 1999


def grew_and_fell(workspace):
    """The loss scale must have been doubled and found too high."""
    import torch

    state = torch.load(workspace.run / "model" / "last.model", weights_only=True)["scaler_state_dict"]
    return None if state["_growth_tracker"] < 100 else f"the loss scale did not grow: {state}"


def swap_speakers(workspace):
    """Exchange the names of two speakers in the list: labels mean others, all stays finite."""
    path = workspace.data / "train_list.txt"
    lines = [line.split() for line in path.read_text().splitlines()]
    other = {"train000": "train001", "train001": "train000"}
    path.write_text("".join(f"{other.get(name, name)} {file}\n" for name, file in lines))


GUARDED_MASK = model(
    init="self.score = nn.Linear(channels, 1)",
    start="loud = x.unfold(1, 400, 160).abs().amax(dim=2) > 0.01",
    pool="""
    loud = loud | ~loud.any(dim=1, keepdim=True)  # a silent row attends to every frame
    scores = self.score(x.transpose(1, 2)).squeeze(2).masked_fill(~loud, -math.inf)
    x = (x * F.softmax(scores, dim=1).unsqueeze(1)).sum(dim=2)
    """,
)
GUARDED_LOG = xvector(
    features="return torch.log10(self.energies(x) + 1e-10)",
    pooling="return torch.where(x > 0, x.clamp(min=1e-8).sqrt(), 0 * x).mean(dim=2)",
)
SELF_MASK = loss(
    """
    points = F.normalize(x, dim=2).reshape(-1, x.shape[2])
    label = torch.arange(len(x)).repeat_interleave(2)
    logits = 20.0 * points @ points.t()
    logits = logits.masked_fill(torch.eye(len(points), dtype=torch.bool), -math.inf)
    partner = torch.arange(len(points)) ^ 1
    loss = F.cross_entropy(logits, partner)
    label = partner
    """,
    constants="per_speaker = (2, 2)",
)
SKIPPED_EMPTY = loss(
    COSINE,
    """
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label)
    wrong = logits.argmax(dim=1) != label
    if wrong.any():
        loss = loss + 0.1 * F.cross_entropy(logits[wrong], label[wrong])
    rare = label == 5
    loss = loss + 0.1 * (x.norm(dim=1) * rare).sum() / rare.sum().clamp(min=1)
    """,
)
NEAR_LIMIT = model(middle="x = F.relu(self.bn(x)) * 2000.0", pool="x = x.amax(dim=2) / 2000.0")


def learnt_nothing(workspace):
    """Clipping at 1e-3 must not have stopped the run."""
    return None if (workspace.run / "model" / "last.model").is_file() else "no state was saved"


FAULTS = (
    Fault(
        id="C1",
        title="silent file, guarded front end",
        settings=ECAPA,
        prepare=spoil(FIRST, voices.silence),
    ),
    Fault(
        id="C2",
        title="samples in the range of int16",
        settings=ECAPA,
        prepare=voices.every_file(voices.times(32768.0)),
    ),
    Fault(
        id="C3",
        title="offset of half of full scale",
        settings=ECAPA,
        prepare=spoil(FIRST, lambda x: x + 0.5),
    ),
    Fault(
        id="C4",
        title="denormal samples",
        settings=ECAPA,
        prepare=spoil(FIRST, voices.times(1e-39)),
    ),
    Fault(
        id="C5",
        title="silent noise, guarded mixing",
        settings={**ECAPA, **NOISE},
        prepare=voices.noises(voices.silence),
    ),
    Fault(
        id="C6",
        title="loss scale grows too far",
        settings={**HALF, "model": "bad", "max_epoch": 1, "test_interval": 1},
        plugins={"models/bad.py": OVERFLOWS_ONCE},
        more=(Stage(edit_last(about_to_grow), {"max_epoch": 2}),),
        check=grew_and_fell,
    ),
    Fault(
        id="C7",
        title="search for the loss scale in the first steps",
        settings={**HALF, "model": "bad", "lr": 0.001},
        plugins={"models/bad.py": OVERFLOWS_ONCE},
        check=scale_found,
    ),
    Fault(
        id="C8",
        title="labels permuted between two runs",
        settings={**ECAPA, "max_epoch": 1, "test_interval": 1},
        more=(Stage(swap_speakers, {"max_epoch": 2}),),
    ),
    Fault(
        id="C9",
        title="loss twenty times as high for one step",
        settings={"trainfunc": "bad"},
        plugins={"loss/bad.py": SPIKE},
    ),
    Fault(
        id="C10",
        title="zero embedding in the evaluation",
        settings={"model": "bad", "max_test_pairs": 0},
        plugins={"models/bad.py": GATED},
        prepare=quiet_trial,
        forbidden=("non-finite", "evaluation failed"),
    ),
    Fault(
        id="C21",
        title="attention mask of -inf, guarded",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": GUARDED_MASK},
        prepare=spoil(FIRST, gap),
    ),
    Fault(
        id="C22",
        title="guarded log and root",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": GUARDED_LOG},
        prepare=spoil(FIRST, voices.silence),
    ),
    Fault(
        id="C23",
        title="every file 120 dB too quiet",
        settings=ECAPA,
        prepare=voices.every_file(voices.times(1e-6)),
    ),
    Fault(
        id="C24",
        title="clipping at 1e-3",
        settings={**ECAPA, "grad_clip": 1e-3},
        check=learnt_nothing,
    ),
    Fault(
        id="C25",
        title="a plateau: learning rate 1e-12",
        settings={"lr": 1e-12, "max_epoch": 4, "test_interval": 4},
    ),
    Fault(
        id="C26",
        title="high but stable rate without BatchNorm",
        settings={**SGD, "model": "Plain", "lr": 0.5, "max_epoch": 6},
        plugins={"models/Plain.py": PLAIN},
    ),
    Fault(
        id="C27",
        title="empty parts of a loss, avoided",
        settings={"trainfunc": "unseen"},
        plugins={"loss/unseen.py": SKIPPED_EMPTY},
    ),
    Fault(
        id="C28",
        title="fp16 near its limit, scale about to grow",
        settings={**HALF, "model": "unseen", "max_epoch": 1},
        plugins={"models/unseen.py": NEAR_LIMIT},
        more=(Stage(edit_last(about_to_grow), {"max_epoch": 2}),),
    ),
    Fault(
        id="C29",
        title="-inf on the diagonal of similarities",
        settings={"trainfunc": "unseen", "nPerSpeaker": 2},
        plugins={"loss/unseen.py": SELF_MASK},
    ),
)
