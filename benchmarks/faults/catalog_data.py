"""Faults of the data: audio files, augmentation, labels; F01 to F17, and those of evaluation."""

import shutil

import voices
from fault import CODE, Fault, Place, Truth, exclude, put
from sources import loss, model
from voices import FIRST, NOISE, REVERB, SAMPLE, at, silence, spoil, times
from workspace import ECAPA

WAV, FLAC = f"wav/{FIRST}.wav", f"wav/{FIRST}.flac"
LENIENT = {**ECAPA, "max_bad_files_pct": 20.0}
TRIAL = "trial001/session1/00001.flac"

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


def input_truth(reasons, file=WAV, sample=None, causes=("input",)) -> Truth:
    """The truth of a bad speech file."""
    return Truth(reasons, causes, (Place(files=(file,), sample=sample),), (exclude(file),))


def augmentation_truth(file: str, sample=None) -> Truth:
    """The truth of a bad impulse response or noise file."""
    return Truth(("data_error",), ("augmentation",), (Place(files=(file,), sample=sample),), (exclude(file),))


FAULTS = (
    Fault(
        "F01",
        "one NaN sample in a float WAV",
        (input_truth(("batch_nonfinite",), sample=SAMPLE),),
        ECAPA,
        prepare=spoil(FIRST, at(SAMPLE, float("nan"))),
        said=(FIRST,),
    ),
    Fault(
        "F02",
        "1e39 in a double WAV, Inf as float32",
        (input_truth(("batch_nonfinite",), sample=SAMPLE),),
        ECAPA,
        prepare=spoil(FIRST, at(SAMPLE, 1e39), "DOUBLE"),
        said=(FIRST,),
    ),
    Fault(
        "F03",
        "float WAV at 1e18, power overflows",
        (input_truth(("loss_nonfinite", "batch_nonfinite")),),
        ECAPA,
        prepare=spoil(FIRST, times(1e18)),
    ),
    Fault(
        "F04",
        "silent WAV and a log without eps",
        (
            Truth(
                ("loss_nonfinite",),
                ("frontend", "input"),
                (Place(code=True, ops=("log",)), Place(files=(WAV,))),
                (CODE, exclude(WAV)),
            ),
        ),
        {"model": "bad"},
        {"models/bad.py": LOG_OF_POWER},
        spoil(FIRST, silence),
    ),
    Fault(
        "F05",
        "WAV header without samples",
        (input_truth(("data_error",), FLAC),),
        LENIENT,
        prepare=voices.replace_bytes(f"{FIRST}.flac", header_only),
        said=(f"{FIRST}.flac.*no samples",),
    ),
    Fault(
        "F06",
        "bytes that are no audio",
        (input_truth(("data_error",), FLAC),),
        LENIENT,
        prepare=voices.replace_bytes(f"{FIRST}.flac", lambda content: bytes(range(256)) * 20),
        said=(f"{FIRST}.flac",),
    ),
    Fault(
        "F06b",
        "truncated FLAC",
        (input_truth(("data_error",), FLAC),),
        LENIENT,
        prepare=voices.replace_bytes(f"{FIRST}.flac", lambda content: content[: len(content) // 4]),
        said=(f"{FIRST}.flac",),
    ),
    Fault(
        "F07",
        "impulse response of zeros",
        (augmentation_truth("rir/1.wav"),),
        {**ECAPA, **REVERB},
        prepare=voices.impulse_responses(silence),
        said=(r"rir/1\.wav.*without energy",),
    ),
    Fault(
        "F08",
        "impulse response with a NaN",
        (augmentation_truth("rir/1.wav", sample=40),),
        {**ECAPA, **REVERB},
        prepare=voices.impulse_responses(lambda x: voices.np.where(voices.np.arange(len(x)) == 40, voices.np.nan, x)),
        said=(r"rir/1\.wav.*non-finite",),
    ),
    Fault(
        "F08b",
        "noise file with NaN",
        (augmentation_truth("musan/noise/1.wav"),),
        {**ECAPA, **NOISE},
        prepare=voices.noises(lambda x: x * float("nan")),
        said=(r"noise/1\.wav.*non-finite",),
    ),
    Fault(
        "F09",
        "silent noise file: named, mixed with gain 0",
        (),
        {**ECAPA, **NOISE},
        prepare=voices.noises(silence),
        said=(r"noise/1\.wav.*silent",),
    ),
    Fault(
        "F10",
        "peak normalisation of a silent file",
        (
            Truth(
                ("loss_nonfinite",),
                ("frontend", "input"),
                (Place(code=True, ops=("div",)), Place(files=(WAV,))),
                (CODE, exclude(WAV)),
            ),
        ),
        {"model": "bad"},
        {"models/bad.py": PEAK_NORM},
        spoil(FIRST, silence),
    ),
    Fault(
        "F11",
        "one frame into a deviation over time",
        (
            Truth(
                ("loss_nonfinite",),
                ("model_forward",),
                (Place(code=True, ops=("std", "var")),),
                (CODE, put("max_frames", lambda v: v >= 70)),
            ),
        ),
        {"model": "bad", "nan_patience": 4},
        {"models/bad.py": ONE_FRAME},
        status=3,
    ),
    Fault(
        "F12",
        "a file reads NaN once, clean afterwards",
        (Truth(("batch_nonfinite",), ("environment",), (Place(files=(WAV,)),)),),
        ECAPA,
        prepare=nan_on_first_read,
        after=repair,
    ),
    Fault(
        "F13",
        "label beyond the classes, from a label map of the loss file",
        (Truth(("label_out_of_range",), ("label",), (Place(files=("wav/train001/session2/00002.flac",)),)),),
        {"trainfunc": "bad"},
        {"loss/bad.py": label_map(9)},
        said=("label 9",),
    ),
    Fault(
        "F13b",
        "nClasses below the speakers of the list",
        (),
        {**ECAPA, "nClasses": 4},
        status=2,
        said=("nClasses: 4 is fewer than the 6 classes",),
    ),
    Fault(
        "F14",
        "label -1, from a label map of the loss file",
        (Truth(("label_out_of_range",), ("label",), (Place(files=("wav/train001/session2/00002.flac",)),)),),
        {"trainfunc": "bad"},
        {"loss/bad.py": label_map(-1)},
        said=("label -1",),
    ),
    Fault(
        "F15",
        "every label of a batch ignored (-100)",
        (
            Truth(
                ("loss_nonfinite",),
                ("loss", "label"),
                (Place(code=True, ops=("nll_loss", "nll_loss_forward", "cross_entropy", "cross_entropy_loss")),),
                (CODE,),
            ),
        ),
        {"trainfunc": "bad", "nan_patience": 1000},
        {"loss/bad.py": IGNORED},
    ),
    Fault(
        "F16",
        "class weights zero for all present",
        (
            Truth(
                ("loss_nonfinite",),
                ("loss", "label"),
                (Place(code=True, ops=("nll_loss", "nll_loss_forward", "cross_entropy", "cross_entropy_loss")),),
                (CODE,),
            ),
        ),
        {"trainfunc": "bad", "nan_patience": 1000},
        {"loss/bad.py": WEIGHTED},
    ),
    Fault(
        "F17",
        "NaN weight of a mixup target",
        (Truth(("loss_nonfinite",), ("loss", "label"), (Place(code=True, ops=("div",)),), (CODE,)),),
        {"trainfunc": "bad", "nan_patience": 1000},
        {"loss/bad.py": MIXUP},
    ),
    Fault(
        "F60",
        "one NaN test file",
        (),
        {**ECAPA, "max_nan_score_pct": 60.0, "max_test_pairs": 0},
        prepare=lambda w: spoil_trial(w),
        said=(f"test file {TRIAL[:-5]}", "1 NaN", "spoils [0-9]+ trials"),
    ),
    Fault(
        "F60b",
        "one empty test file",
        (),
        {**ECAPA, "max_nan_score_pct": 60.0, "max_test_pairs": 0},
        prepare=voices.replace_bytes(TRIAL, header_only),
        said=(f"test file {TRIAL}", "no samples"),
    ),
)


def spoil_trial(workspace):
    """One NaN in a test file."""
    voices.rewrite(workspace, TRIAL[:-5], at(SAMPLE, float("nan")))
