"""Data: audio files, augmentation, labels, and test files."""

import shutil

import voices
from fault import CODE, Fault, Place, Truth, exclude, marked, put
from sources import loss, model
from voices import FIRST, NOISE, REVERB, SAMPLE, at, silence, spoil, times
from workspace import ECAPA

from catalog.shared import LENIENT, TRIAL, WAV, augmentation_truth, input_truth

FLAC = f"wav/{FIRST}.flac"
LOG_OF_POWER = model(
    helper='''
    class FrontEnd(nn.Module):
        """Log power in eight bands."""

        def forward(self, x):
            spectrum = torch.stft(x, 400, 160, window=torch.hamming_window(400), return_complex=True)
            power = spectrum.abs().square()[:, :200].unflatten(1, (8, 25)).mean(2)
            return torch.log(power)  #!
    ''',
    init="self.frontend = FrontEnd()",
    start="features = self.frontend(x)",
    middle="x = F.relu(self.bn(features))",
)
PEAK_NORM = model(start="x = x / x.abs().amax(dim=1, keepdim=True)  #!")
ONE_FRAME = model(
    middle="x = F.relu(self.bn(x))[:, :, ::64]",
    pool="x = torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)  #!",
    width=16,
)
SOFTMAX_HEAD = "logits = F.linear(x, self.weight)"
IGNORED = loss(
    SOFTMAX_HEAD,
    """
    known = torch.where(label < 1, label, -100)  # pseudo-labels: only speaker 0 is confirmed
    loss = F.cross_entropy(logits, known)  #!
    """,
)
WEIGHTED = loss(
    SOFTMAX_HEAD,
    "loss = F.cross_entropy(logits, label, weight=self.class_weight)  #!",
    init="self.register_buffer('class_weight', (torch.arange(nClasses) == 5).float())",
)
MIXUP = loss(
    SOFTMAX_HEAD,
    """
    draws = torch.relu(torch.randn(2, len(label)) - 0.7)
    share = draws[0] / draws.sum(dim=0)  #!
    each = F.cross_entropy(logits, label, reduction="none")
    other = F.cross_entropy(logits, label.flip(0), reduction="none")
    loss = (share * each + (1 - share) * other).mean()
    """,
)
LABEL_MAP = """
import DatasetLoader

original = DatasetLoader.TrainDataset.__getitem__


def relabel(self, item):
    audio, label, files, events = original(self, item)
    return audio, ({value} if files[0]["utterance"] == 7 else label), files, events  #!


DatasetLoader.TrainDataset.__getitem__ = relabel
"""


def label_map(value: int) -> str:
    """A loss file that brings its own label map, wrong for utterance 7."""
    source = loss(SOFTMAX_HEAD, "loss = F.cross_entropy(logits, label)")
    return source + LABEL_MAP.format(value=value).replace("#!", "# FAULT")


def header_only(content: bytes) -> bytes:
    """A WAV header that promises nothing."""
    return (
        b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x80>\x00\x00\x00}\x00\x00\x02\x00\x10\x00data"
        + bytes(4)
    )


def repair(workspace):
    """Put the clean samples back, as a disk does that answers right the second time."""
    shutil.copy2(workspace.data / "clean.wav", workspace.data / WAV)


def nan_on_first_read(workspace):
    """A file with a NaN, and its clean form beside it for later."""
    path = voices.rewrite(workspace, FIRST, lambda samples: None)
    shutil.copy2(path, workspace.data / "clean.wav")
    samples, rate = voices.soundfile.read(path, dtype="float32")
    samples[SAMPLE] = float("nan")
    voices.soundfile.write(path, samples, rate, subtype="FLOAT")


def spoil_trial(workspace):
    """One NaN in a test file."""
    voices.rewrite(workspace, TRIAL[:-5], at(SAMPLE, float("nan")))


FAULTS = (
    Fault(
        id="F01",
        title="one NaN sample in a float WAV",
        settings=ECAPA,
        prepare=spoil(FIRST, at(SAMPLE, float("nan"))),
        truths=(input_truth(("batch_nonfinite",), sample=SAMPLE),),
        said=(FIRST,),
    ),
    Fault(
        id="F02",
        title="1e39 in a double WAV, Inf as float32",
        settings=ECAPA,
        prepare=spoil(FIRST, at(SAMPLE, 1e39), "DOUBLE"),
        truths=(input_truth(("batch_nonfinite",), sample=SAMPLE),),
        said=(FIRST,),
    ),
    Fault(
        id="F03",
        title="float WAV at 1e18, power overflows",
        settings=ECAPA,
        prepare=spoil(FIRST, times(1e18)),
        truths=(input_truth(("loss_nonfinite", "batch_nonfinite")),),
    ),
    Fault(
        id="F04",
        title="silent WAV and a log without eps",
        settings={"model": "bad"},
        plugins={"models/bad.py": LOG_OF_POWER},
        prepare=spoil(FIRST, silence),
        truths=(
            Truth(
                ("loss_nonfinite",),
                ("frontend", "input"),
                (marked("log"), Place(files=(WAV,))),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="F05",
        title="WAV header without samples",
        settings=LENIENT,
        prepare=voices.replace_bytes(f"{FIRST}.flac", header_only),
        truths=(input_truth(("data_error",), FLAC),),
        said=(f"{FIRST}.flac.*no samples",),
    ),
    Fault(
        id="F06",
        title="bytes that are no audio",
        settings=LENIENT,
        prepare=voices.replace_bytes(f"{FIRST}.flac", lambda content: bytes(range(256)) * 20),
        truths=(input_truth(("data_error",), FLAC),),
        said=(f"{FIRST}.flac",),
    ),
    Fault(
        id="F06b",
        title="truncated FLAC",
        settings=LENIENT,
        prepare=voices.replace_bytes(f"{FIRST}.flac", lambda content: content[: len(content) // 4]),
        truths=(input_truth(("data_error",), FLAC),),
        said=(f"{FIRST}.flac",),
    ),
    Fault(
        id="F07",
        title="impulse response of zeros",
        settings={**ECAPA, **REVERB},
        prepare=voices.impulse_responses(silence),
        truths=(augmentation_truth("rir/1.wav"),),
        said=(r"rir/1\.wav.*without energy",),
    ),
    Fault(
        id="F08",
        title="impulse response with a NaN",
        settings={**ECAPA, **REVERB},
        prepare=voices.impulse_responses(lambda x: voices.np.where(voices.np.arange(len(x)) == 40, voices.np.nan, x)),
        truths=(augmentation_truth("rir/1.wav", sample=40),),
        said=(r"rir/1\.wav.*non-finite",),
    ),
    Fault(
        id="F08b",
        title="noise file with NaN",
        settings={**ECAPA, **NOISE},
        prepare=voices.noises(lambda x: x * float("nan")),
        truths=(augmentation_truth("musan/noise/1.wav"),),
        said=(r"noise/1\.wav.*non-finite",),
    ),
    Fault(
        id="F09",
        title="silent noise file: named, mixed with gain 0",
        settings={**ECAPA, **NOISE},
        prepare=voices.noises(silence),
        said=(r"noise/1\.wav.*silent",),
    ),
    Fault(
        id="F10",
        title="peak normalisation of a silent file",
        settings={"model": "bad"},
        plugins={"models/bad.py": PEAK_NORM},
        prepare=spoil(FIRST, silence),
        truths=(
            Truth(
                ("loss_nonfinite",),
                ("frontend", "input"),
                (marked("div"), Place(files=(WAV,))),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="F11",
        title="one frame into a deviation over time",
        settings={"model": "bad", "nan_patience": 4},
        plugins={"models/bad.py": ONE_FRAME},
        truths=(
            Truth(
                ("loss_nonfinite",),
                ("model_forward",),
                (marked("std", "var"),),
                (CODE, put("max_frames", lambda v: v >= 70)),
            ),
        ),
        status=3,
    ),
    Fault(
        id="F12",
        title="a file reads NaN once, clean afterwards",
        settings=ECAPA,
        prepare=nan_on_first_read,
        after=repair,
        truths=(Truth(("batch_nonfinite",), ("environment",), (Place(files=(WAV,)),)),),
    ),
    Fault(
        id="F13",
        title="label beyond the classes, from a label map of the loss file",
        settings={"trainfunc": "bad"},
        plugins={"loss/bad.py": label_map(9)},
        truths=(Truth(("label_out_of_range",), ("label",), (Place(files=("wav/train001/session2/00002.flac",)),)),),
        said=("label 9",),
    ),
    Fault(
        id="F13b",
        title="nClasses below the speakers of the list",
        settings={**ECAPA, "nClasses": 4},
        status=2,
        said=("nClasses: 4 is fewer than the 6 classes",),
    ),
    Fault(
        id="F14",
        title="label -1, from a label map of the loss file",
        settings={"trainfunc": "bad"},
        plugins={"loss/bad.py": label_map(-1)},
        truths=(Truth(("label_out_of_range",), ("label",), (Place(files=("wav/train001/session2/00002.flac",)),)),),
        said=("label -1",),
    ),
    Fault(
        id="F15",
        title="every label of a batch ignored (-100)",
        settings={"trainfunc": "bad", "nan_patience": 1000},
        plugins={"loss/bad.py": IGNORED},
        truths=(
            Truth(
                ("loss_nonfinite",),
                ("loss", "label"),
                (marked("nll_loss", "nll_loss_forward", "cross_entropy", "cross_entropy_loss"),),
                (CODE,),
            ),
        ),
    ),
    Fault(
        id="F16",
        title="class weights zero for all present",
        settings={"trainfunc": "bad", "nan_patience": 1000},
        plugins={"loss/bad.py": WEIGHTED},
        truths=(
            Truth(
                ("loss_nonfinite",),
                ("loss", "label"),
                (marked("nll_loss", "nll_loss_forward", "cross_entropy", "cross_entropy_loss"),),
                (CODE,),
            ),
        ),
    ),
    Fault(
        id="F17",
        title="NaN weight of a mixup target",
        settings={"trainfunc": "bad", "nan_patience": 1000},
        plugins={"loss/bad.py": MIXUP},
        truths=(Truth(("loss_nonfinite",), ("loss", "label"), (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="F60",
        title="one NaN test file",
        settings={**ECAPA, "max_nan_score_pct": 60.0, "max_test_pairs": 0},
        prepare=lambda w: spoil_trial(w),
        said=(f"test file {TRIAL[:-5]}", "1 NaN", "spoils [0-9]+ trials"),
    ),
    Fault(
        id="F60b",
        title="one empty test file",
        settings={**ECAPA, "max_nan_score_pct": 60.0, "max_test_pairs": 0},
        prepare=voices.replace_bytes(TRIAL, header_only),
        said=(f"test file {TRIAL}", "no samples"),
    ),
)
