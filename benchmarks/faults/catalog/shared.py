"""What several files of the catalogue use: settings, changes to a run, and reasons, causes and fixes."""

import shutil

import voices
from fault import Place, Truth, exclude, put
from sources import loss, model
from voices import FIRST, SAMPLE, SECOND, at
from workspace import ECAPA

# ------------------------------------------------------------------------------------------------- files and settings

WAV = f"wav/{FIRST}.wav"
TRIAL = "trial001/session1/00001.flac"
PAIR = (WAV, f"wav/{SECOND}.wav")
LENIENT = {**ECAPA, "max_bad_files_pct": 20.0}
HALF = {"mixedprec": True, "amp_dtype": "float16"}
BRAIN = {"mixedprec": True, "amp_dtype": "bfloat16"}
RANKS = {"batch_size": 3}
SGD = {
    "optimizer": "sgd",
    "scheduler": "steplr",
    "trainfunc": "softmax",
    "nan_patience": 4,
    "max_epoch": 30,
    "test_interval": 30,
    "momentum": 0.9,
    "grad_clip": 0.0,
}

# ------------------------------------------------------------------------------------- reasons, causes, fixes, truths

FORWARD = ("loss_nonfinite",)
BACKWARD = ("grad_nonfinite",)
ANY = (*FORWARD, *BACKWARD)
STOPPED = ("loss_nonfinite", "grad_nonfinite", "grad_norm_overflow", "state_nonfinite")
LOSS = ("loss",)
LAYER = ("model_forward",)
SLOPE = ("model_backward",)
FILTERS = (*LAYER, "input", "frontend")
PRECISION = ("precision",)
FP32 = (put("mixedprec", lambda v: not v),)


def below(limit: float):
    """A value of at most ``limit``."""
    return lambda value: 0 < value <= limit


def input_truth(reasons, file=WAV, sample=None, causes=("input",)) -> Truth:
    """The truth of a bad speech file."""
    return Truth(reasons, causes, (Place(files=(file,), sample=sample),), (exclude(file),))


def augmentation_truth(file: str, sample=None) -> Truth:
    """The truth of a bad impulse response or noise file."""
    return Truth(("data_error",), ("augmentation",), (Place(files=(file,), sample=sample),), (exclude(file),))


# ------------------------------------------------------------------------------------------------ sources of plug-ins

DEAD = "self.bn.bias.data[3] = -30.0  # a channel that has died"
PLAIN = model(middle="x = F.relu(x)")  # without BatchNorm, which would absorb any weight
OVERFLOWS_ONCE = model(end="return self.fc(x * 20.0)")
TINY_EPS = model(
    init="self.bn.bias.data[:] = -1.5",
    pool="""
    x = x[:, :, :6]
    x = x / (x.amax(dim=2, keepdim=True) + 1e-10)  #!
    x = x.mean(dim=2)
    """,
)
RMS_NORM = model(
    init="self.conv = nn.Conv1d(1, channels, 400, stride=160, bias=False)",
    middle="""
    x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True))  #!
    x = F.relu(self.bn(x))
    """,
)
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
IMPRINTED = "self.imprinted = False"
AAM = """
target = cosine[torch.arange(len(label)), label]
sine = torch.sqrt({inside})  #!
shifted = target * math.cos(self.margin) - sine * math.sin(self.margin)
logits = cosine.index_put((torch.arange(len(label)), label), shifted) * self.scale
loss = F.cross_entropy(logits, label)
"""
# Not clamp(0, 1): at its very end it hands the gradient on up to torch 2.13 and none from 2.14 on.
CLAMPED = loss(
    IMPRINT, COSINE, AAM.format(inside="torch.where(target > 1, 0.0, 1.0 - target.square())"), init=IMPRINTED
)

# ---------------------------------------------------------------------------------------------- what is done to a run

NAN = at(SAMPLE, float("nan"))


def gap(samples):
    """A drop-out of 50 ms of digital silence."""
    samples[5800:6600] = 0.0


def duplicate(workspace):
    """Speaker 3 has one recording under every name, as long as a crop, so that a pair of it is twice the same."""
    for number in range(5):
        name = f"train003/session{number % 4}/{number:05d}"
        source, rate = voices.soundfile.read(workspace.data / "wav" / "train003/session0/00000.flac")
        voices.soundfile.write(workspace.data / "wav" / f"{name}.flac", source[:9840], rate)


def edit_last(change):
    """A preparation that changes the run's newest full state."""

    def prepare(workspace):
        import torch

        path = workspace.run / "model" / "last.model"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return prepare


def start_over(workspace):
    """Keep the newest state as an initial model, and forget the run."""
    (workspace.run / "model" / "last.model").rename(workspace.folder / "initial.model")
    shutil.rmtree(workspace.run)


def scale_found(workspace):
    """The loss scale must have been lowered: the run did meet the overflow that must not be reported."""
    import torch

    scale = torch.load(workspace.run / "model" / "last.model", weights_only=True)["scaler_state_dict"]["scale"]
    return None if scale < 2.0**16 else f"no overflow happened: the loss scale is {scale}"
