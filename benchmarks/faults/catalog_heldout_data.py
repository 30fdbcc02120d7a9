"""Held-out faults of the data (H55 to H64), and controls of which nothing may be said (C21 to C29)."""

import numpy as np
import soundfile
import voices
from catalog_data import input_truth
from catalog_heldout_features import UNSEEN, WAV, gap, of_layer, xvector
from catalog_loss import COSINE
from catalog_quiet import about_to_grow
from catalog_training import PLAIN, SGD, edit_last
from fault import Fault, Place, Stage, Truth, exclude
from sources import loss, model
from voices import FIRST, NOISE, RATE, SAMPLE, SECOND, at, spoil, together
from workspace import ECAPA

BATCH, LOSS = ("batch_nonfinite",), ("loss_nonfinite", "batch_nonfinite")
NAN = at(SAMPLE, float("nan"))
HALF = {"mixedprec": True, "amp_dtype": "float16"}


def rewritten(change, name=FIRST, rate=RATE):
    """A preparation: an utterance becomes what ``change`` makes of its samples, at another rate."""

    def prepare(workspace):
        path = voices.rewrite(workspace, name, lambda samples: None)
        samples, _ = soundfile.read(path)
        soundfile.write(path, change(samples), rate, subtype="FLOAT")

    return prepare


def old_telephone(samples):
    """8 kHz, with a NaN at its sample 3000."""
    samples = samples[::2].copy()
    samples[3000] = np.nan
    return samples


def right_channel(samples):
    """Two channels, a NaN in the second."""
    both = np.stack([samples, 0.5 * samples], axis=1)
    both[SAMPLE, 1] = np.nan
    return both


def short(samples):
    """Shorter than a crop, a NaN near the end."""
    samples = samples[:7000].copy()
    samples[6900] = np.nan
    return samples


def normalised_by_zero(samples):
    """Divided by a peak that was 0."""
    return samples * np.float64("nan")


def bad_music(workspace):
    """A NaN in one music and one babble file."""
    voices.noises(lambda samples: samples)(workspace)
    for name in ("music/2.wav", "speech/0.wav"):
        path = workspace.data / "musan" / name
        samples, _ = soundfile.read(path)
        samples[8000] = np.nan
        soundfile.write(path, samples, RATE, subtype="FLOAT")


NOISES = ("musan/music/2.wav", "musan/speech/0.wav")  # drawn in one batch, so that one dump has both
PAIR = (WAV, f"wav/{SECOND}.wav")
VIEWS = {"nPerSpeaker": 2, "batch_size": 3, "trainfunc": "angleproto"}
DATA_FAULTS = (
    Fault(
        *("H55", "8 kHz file with a NaN: its own sample index", (input_truth(BATCH, sample=3000),), ECAPA),
        prepare=rewritten(old_telephone, rate=8000),
        said=(FIRST,),
    ),
    Fault(
        *("H56", "a NaN in the second channel only", (input_truth(BATCH, sample=SAMPLE),), ECAPA),
        prepare=rewritten(right_channel),
        said=(FIRST,),
    ),
    Fault(
        *("H57", "a NaN near the end of a file that is repeated", (input_truth(BATCH, sample=6900),), ECAPA),
        prepare=rewritten(short),
        said=(FIRST,),
    ),
    Fault(
        *("H58", "a file of the constant 1e30", (input_truth(LOSS),), ECAPA),
        prepare=spoil(FIRST, lambda samples: samples * 0 + 1e30),
    ),
    Fault(
        *("H59", "one sample of 1e20 in good speech", (input_truth(LOSS, sample=SAMPLE),), ECAPA),
        prepare=spoil(FIRST, at(SAMPLE, 1e20)),
    ),
    Fault(
        *("H60", "NaN in a music and in a babble file"),
        (Truth(("data_error",), ("augmentation",), (Place(files=NOISES, sample=8000),), (exclude(*NOISES),)),),
        {**ECAPA, **NOISE},
        prepare=bad_music,
        said=(r"music/2\.wav.*non-finite", r"speech/0\.wav.*non-finite"),
    ),
    Fault(
        *("H61", "a NaN file in a pair loss", (input_truth(BATCH, sample=SAMPLE),), {**ECAPA, **VIEWS}),
        prepare=spoil(FIRST, NAN),
    ),
    Fault(
        *("H62", "a NaN file at three speeds", (input_truth(BATCH, sample=SAMPLE),)),
        {**ECAPA, "speed_perturb": True, "max_epoch": 1, "test_interval": 1},
        prepare=spoil(FIRST, NAN),
    ),
    Fault(
        *("H63", "an all-NaN file and one with an Inf in one batch"),
        (Truth(BATCH, ("input",), (Place(files=PAIR),), (exclude(*PAIR),)),),
        {**ECAPA, "batch_size": 15, "max_epoch": 1, "test_interval": 1},
        prepare=together(spoil(FIRST, normalised_by_zero), spoil(SECOND, at(SAMPLE, -np.inf))),
    ),
    of_layer(
        *("H64", "level of a silent file in dB, as an extra channel", ("loss_nonfinite",)),
        ("frontend", "model_forward", "input"),
        ("log10", "log"),
        xvector(
            features="""
            with torch.no_grad():
                bands = self.energies(x).add(1e-6).log()
                level = x.pow(2).mean(dim=1).sqrt()
                decibels = torch.mul(
                    torch.log10(level),  #!
                    20.0,
                )
                bands[:, -1] = decibels.view(-1, 1)
            return bands
            """
        ),
        file=True,
        prepare=spoil(FIRST, voices.silence),
    ),
)
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


CONTROLS = (
    Fault("C21", "attention mask of -inf, guarded", (), UNSEEN, {"models/unseen.py": GUARDED_MASK}, spoil(FIRST, gap)),
    Fault("C22", "guarded log and root", (), UNSEEN, {"models/unseen.py": GUARDED_LOG}, spoil(FIRST, voices.silence)),
    Fault("C23", "every file 120 dB too quiet", (), ECAPA, prepare=voices.every_file(voices.times(1e-6))),
    Fault("C24", "clipping at 1e-3", settings={**ECAPA, "grad_clip": 1e-3}, check=learnt_nothing),
    Fault("C25", "a plateau: learning rate 1e-12", settings={"lr": 1e-12, "max_epoch": 4, "test_interval": 4}),
    Fault(
        *("C26", "high but stable rate without BatchNorm", (), {**SGD, "model": "Plain", "lr": 0.5, "max_epoch": 6}),
        plugins={"models/Plain.py": PLAIN},
    ),
    Fault("C27", "empty parts of a loss, avoided", (), {"trainfunc": "unseen"}, {"loss/unseen.py": SKIPPED_EMPTY}),
    Fault(
        *("C28", "fp16 near its limit, scale about to grow", (), {**HALF, **UNSEEN, "max_epoch": 1}),
        plugins={"models/unseen.py": NEAR_LIMIT},
        more=(Stage(edit_last(about_to_grow), {"max_epoch": 2}),),
    ),
    Fault(
        *("C29", "-inf on the diagonal of similarities", (), {"trainfunc": "unseen", "nPerSpeaker": 2}),
        plugins={"loss/unseen.py": SELF_MASK},
    ),
)
FAULTS = (*DATA_FAULTS, *CONTROLS)
