"""Features and augmentation of one's own: learned exponents, phases, linear prediction, empty filters, mixing."""

from fault import CODE, Fault, Place, Truth, exclude, marked, put
from sources import block, model, xvector
from voices import FIRST, NOISE, noises, silence, spoil
from workspace import ECAPA

from catalog.shared import BACKWARD, FILTERS, FORWARD, LAYER, TRIAL, WAV, gap

FRONT_END = '''"""{what}"""

import torch
from torch import nn


class FrontEnd(nn.Module):
    def __init__(self, n_mels=24, sample_rate=16000):
        super().__init__()
        self.register_buffer("window", torch.hann_window(400))
        self.register_buffer("pick", torch.linspace(2, 198, n_mels).long())
{init}

    def frames(self, x):
        return x.unfold(1, 400, 160)  # (B, frames, 400)

    def forward(self, x):
{body}
'''


def front_end(what, body, init="pass") -> str:
    """Source of a front end plug-in; '#!' marks the fault."""
    return FRONT_END.format(what=what, init=block(init), body=block(body))


PCEN = front_end(
    "Per-channel energy normalisation whose offset and root are learned.",
    """
    energy = torch.fft.rfft(self.frames(x) * self.window).abs().square()[..., self.pick].transpose(1, 2)
    smooth = [energy[..., 0]]
    for n in range(1, energy.shape[2]):
        smooth.append(0.975 * smooth[-1] + 0.025 * energy[..., n])
    gain = (torch.stack(smooth, dim=2) + 1e-6) ** -0.9
    return (energy * gain + self.delta) ** self.root - self.delta**self.root  #!
    """,
    init="""
    self.delta = nn.Parameter(torch.zeros(n_mels, 1))  #!
    self.root = nn.Parameter(torch.full((n_mels, 1), 0.5))
    """,
)
GROUP_DELAY = front_end(
    "Group delay: the real part of the spectrum of n x(n) over that of x(n).",
    """
    frames = self.frames(x) * self.window
    spectrum = torch.fft.rfft(frames)
    ramped = torch.fft.rfft(frames * torch.arange(400, device=x.device))
    product = spectrum.real * ramped.real + spectrum.imag * ramped.imag
    delay = product / spectrum.abs().square()  #!
    return 0.01 * delay.clamp(-400, 400)[..., self.pick].transpose(1, 2)
    """,
)
SLIDING = xvector(
    init="self.width = 12",
    features="""
    x = self.energies(x).add(1e-6).log()
    width = self.width
    total = F.pad(x.cumsum(dim=2), (1, 0))
    square = F.pad((x * x).cumsum(dim=2), (1, 0))
    mean = (total[..., width:] - total[..., :-width]) / width
    power = (square[..., width:] - square[..., :-width]) / width
    deviation = (power - mean * mean).sqrt()  #!
    return (x[..., width - 1 :] - mean) / (deviation + 1e-5)
    """,
)
LEVINSON = model(
    helper='''
    def linear_prediction(frames, order):
        """Levinson and Durbin's recursion: frames (N, 400) -> coefficients (N, order)."""
        size = frames.shape[1]
        lags = torch.stack([(frames[:, k:] * frames[:, : size - k]).sum(1) for k in range(order + 1)], 1)
        error = lags[:, 0]
        a = torch.zeros_like(lags)
        a[:, 0] = 1.0
        for i in range(1, order + 1):
            k = -(a[:, :i] * lags[:, 1 : i + 1].flip(1)).sum(1) / error  #!
            a[:, 1 : i + 1] = a[:, 1 : i + 1] + k[:, None] * a[:, :i].flip(1)
            error = error * (1.0 - k * k)
        return a[:, 1:]
    ''',
    init="self.mix = nn.Linear(6, channels)",
    start="""
    frames = x.unfold(1, 400, 160)
    with torch.no_grad():
        lpc = linear_prediction(frames.flatten(0, 1), 6).view(*frames.shape[:2], 6)
    """,
    middle="x = F.relu(self.bn(x + 0.1 * self.mix(lpc).transpose(1, 2)))",
)
MELS = model(
    helper='''
    class Mels(nn.Module):
        """Logarithm of mel energies without their mean, (B, T) -> (B, bands, frames)."""

        def __init__(self, bands, n_fft=400):
            super().__init__()
            hertz = torch.arange(n_fft // 2 + 1) * 16000.0 / n_fft
            mels = torch.linspace(0.0, 2595.0 * math.log10(1.0 + 8000.0 / 700.0), bands + 2)
            edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
            rise = (hertz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
            fall = (edges[2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
            self.register_buffer("bank", torch.minimum(rise, fall).clamp(min=0.0))  #!
            self.register_buffer("window", torch.hann_window(n_fft))
            self.n_fft = n_fft

        def forward(self, x):
            spectrum = torch.stft(x, self.n_fft, 160, window=self.window, return_complex=True)
            x = torch.log(self.bank.t() @ spectrum.abs().square())  #!
            return x - x.mean(dim=2, keepdim=True)
    ''',
    init="""
    self.mels = Mels(128)
    self.conv = nn.Conv1d(128, channels, 5)
    """,
    start="x = self.mels(x).flatten(0, 0)",
).replace("self.conv(x.unsqueeze(1))", "self.conv(x)")
PCM = model(
    start="""
    pcm = (x * 32767).to(torch.int16).unfold(1, 400, 160)
    energy = (pcm * pcm).float().mean(dim=2)  #!
    level = energy.log10()  #!
    """,
    middle="x = F.relu(self.bn(x + 0.1 * level[:, None]))",
)
OVERLAP_ADD = model(
    helper="""
    def overlap_add(frames, hop=160):
        count, width = frames.shape[1:]
        size = (count - 1) * hop + width
        return F.fold(frames.transpose(1, 2), (1, size), (1, width), stride=(1, hop)).flatten(1)
    """,
    init="self.gate = nn.Parameter(torch.zeros(201))",
    start="""
    window = torch.hann_window(400)
    frames = x.unfold(1, 400, 160) * window
    spectrum = torch.fft.rfft(frames) * torch.sigmoid(self.gate)
    signal = overlap_add(torch.fft.irfft(spectrum, 400) * window)
    overlap = overlap_add(window.square().expand(1, frames.shape[1], 400))
    x = signal / overlap  #!
    """,
)
WARPING = xvector(
    features="""
    x = self.energies(x).add(1e-6).log()
    rank = x.argsort(dim=2).argsort(dim=2).float()
    return math.sqrt(2.0) * torch.erfinv(2.0 * rank / (x.shape[2] - 1) - 1.0)  #!
    """,
)
LEVELS = model(
    start="""
    levels = [20.0 * math.log10(row.abs().max().item()) for row in x]  #!
    x = x * torch.tensor([10.0 ** (-(level + 6.0) / 20.0) for level in levels])[:, None]
    """
)
STANDARD = model(start="x = x / x.std(dim=1, keepdim=True)  #!")

MIXES = '''"""Noise of musan_path, mixed by hand."""

import numpy as np


class Augmentation:
    """Adds a noise at a ratio of ``snr`` in dB."""

    category = "noise"

    def __init__(self, snr=(0, 15)):
        self.snr = snr

    def draw(self, x, rng, sounds) -> dict:
        number = int(rng.integers(sounds.count("noise")))
        noise, draw = sounds.crop("noise", number, len(x), float(rng.random()))
        return {**draw, "snr": float(rng.uniform(*self.snr))}

    @staticmethod
    def apply(x, draw, sounds):
        noise = sounds.noise(draw["path"], len(x), draw["start"])
        ratio = np.mean(x**2) / np.mean(noise**2)  # FAULT
        return x + np.float32(np.sqrt(ratio / 10 ** (draw["snr"] / 10))) * noise  # FAULT
'''
COMPRESSES = '''"""A compressor."""

import numpy as np


class Augmentation:
    """Raises quiet parts: the level over the peak to the power of ``ratio``."""

    def __init__(self, ratio=(0.5, 0.9)):
        self.ratio = ratio

    def draw(self, x, rng, sounds) -> dict:
        return {"ratio": float(rng.uniform(*self.ratio))}

    @staticmethod
    def apply(x, draw, sounds):
        peak = np.abs(x).max()
        level = np.abs(x) / peak  # FAULT
        return (peak * np.sign(x) * level ** np.float32(draw["ratio"])).astype(np.float32)
'''
TRIMS = '''"""The start of the speech is moved to the front."""

import numpy as np


class Augmentation:
    """Rolls the crop so that it begins with the first sample above ``threshold``."""

    def __init__(self, threshold=0.01):
        self.threshold = threshold

    def draw(self, x, rng, sounds) -> dict:
        return {"first": int(np.flatnonzero(np.abs(x) > self.threshold)[0])}  # FAULT

    @staticmethod
    def apply(x, draw, sounds):
        return np.roll(x, -draw["first"])
'''
LEVELLING = '''"""A level that is drawn around that of telephone speech."""

import numpy as np


class Augmentation:
    """Brings the crop to a level drawn from ``db`` in dB of full scale."""

    def __init__(self, db=(-30, -20)):
        self.db = db

    def draw(self, x, rng, sounds) -> dict:
        level = 10 * np.log10(np.mean(x.astype(np.float64) ** 2))  # FAULT
        return {"gain_db": float(rng.uniform(*self.db) - level)}

    @staticmethod
    def apply(x, draw, sounds):
        return x * np.float32(10 ** (draw["gain_db"] / 20))  # FAULT
'''
OF_PYTHON = LEVELLING.replace("10 * np.log10(np.mean(x.astype(np.float64) ** 2))", "20 * math.log10(np.abs(x).max())")
OF_PYTHON = OF_PYTHON.replace("import numpy", "import math\n\nimport numpy").replace("/ 20))  # FAULT", "/ 20))")
POLICY = put("augmentation", lambda v: "own" not in str(v))
SPEECH = Truth(
    ("batch_nonfinite", "data_error"),
    ("augmentation",),
    (marked(), Place(files=(WAV,))),
    (CODE, exclude(WAV), POLICY),
)


def silent_trial(workspace):
    """Write a test file of zeros."""
    from voices import soundfile

    path = workspace.data / "wav" / TRIAL
    samples, rate = soundfile.read(path)
    soundfile.write(path, samples * 0.0, rate)


FAULTS = (
    Fault(
        id="X01",
        title="PCEN with a learned offset that starts at 0",
        settings={**ECAPA, "frontend": "own", "nan_patience": 4},
        plugins={"frontend/own.py": PCEN},
        truths=(
            Truth(BACKWARD, ("frontend",), (marked(), Place(parameters=("__S__.features.plugin.delta",))), (CODE,)),
        ),
        status=3,
    ),
    Fault(
        id="X02",
        title="group delay of a drop-out of zeros, in a front end",
        settings={**ECAPA, "frontend": "own", "nan_patience": 1000},
        plugins={"frontend/own.py": GROUP_DELAY},
        prepare=spoil(FIRST, gap),
        truths=(Truth(FORWARD, ("frontend", "input"), (marked("div"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="X04",
        title="sliding normalisation by differences of sums, a silent file",
        settings={"model": "own", "nan_patience": 1000},
        plugins={"models/own.py": SLIDING},
        prepare=spoil(FIRST, silence),
        truths=(Truth(FORWARD, FILTERS, (marked("sqrt"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="X05",
        title="linear prediction of a drop-out of zeros, a recursion",
        settings={"model": "own", "nan_patience": 1000},
        plugins={"models/own.py": LEVINSON},
        prepare=spoil(FIRST, gap),
        truths=(Truth(FORWARD, FILTERS, (marked("div"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="X06",
        title="mel filters narrower than a bin, log of what they let through",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": MELS},
        truths=(Truth(FORWARD, (*LAYER, "frontend"), (marked("log"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X07",
        title="energy of 16-bit samples wraps around, its logarithm",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": PCM},
        truths=(Truth(FORWARD, (*LAYER, "frontend"), (marked("log10", "mul", "mean"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X08",
        title="overlap-add over the sum of windows, which begins at 0",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": OVERLAP_ADD},
        truths=(Truth(FORWARD, (*LAYER, "frontend"), (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X09",
        title="feature warping: the quantile of ranks 0 and 1",
        settings={"model": "own", "nan_patience": 4},
        plugins={"models/own.py": WARPING},
        truths=(Truth(FORWARD, (*LAYER, "frontend"), (marked("erfinv"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="X10",
        title="math.log10 of the peak of a silent file",
        settings={"model": "own", "nan_patience": 1000},
        plugins={"models/own.py": LEVELS},
        prepare=spoil(FIRST, silence),
        truths=(Truth(FORWARD, FILTERS, (marked(), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="X11",
        title="a silent test file over its deviation: the evaluation alone",
        settings={"model": "own", "max_nan_score_pct": 60.0, "max_test_pairs": 0},
        plugins={"models/own.py": STANDARD},
        prepare=silent_trial,
        said=(f"test file {TRIAL}", "spoils [0-9]+ trials", r"waveform .* 0 to 0"),
    ),
    Fault(
        id="X47",
        title="math.log10 of the peak of a silent test file: the evaluation alone",
        settings={"model": "own", "max_nan_score_pct": 60.0, "max_test_pairs": 0},
        plugins={"models/own.py": LEVELS},
        prepare=silent_trial,
        said=(f"test file {TRIAL}: models/own.py:[0-9]+: ValueError", "spoils [0-9]+ trials", r"waveform .* 0 to 0"),
    ),
    Fault(
        id="X12",
        title="an augmentation divides by the power of a silent noise",
        settings={**ECAPA, **NOISE, "augmentation": [{"own": {}}]},
        plugins={"augmentation/own.py": MIXES},
        prepare=noises(silence),
        truths=(
            Truth(
                ("batch_nonfinite", "data_error"),
                ("augmentation",),
                (marked(), Place(files=("musan/noise/1.wav",))),
                (CODE, exclude("musan/noise/1.wav"), POLICY),
            ),
        ),
    ),
    Fault(
        id="X13",
        title="a compressor divides by the peak of a silent file",
        settings={**ECAPA, "augment": True, "augment_prob": 1.0, "augmentation": [{"own": {}}]},
        plugins={"augmentation/own.py": COMPRESSES},
        prepare=spoil(FIRST, silence),
        truths=(SPEECH,),
    ),
    Fault(
        id="X14",
        title="an augmentation finds no speech in a silent file: IndexError",
        settings={**ECAPA, "augment": True, "augment_prob": 1.0, "augmentation": [{"own": {}}]},
        plugins={"augmentation/own.py": TRIMS},
        prepare=spoil(FIRST, silence),
        truths=(SPEECH,),
    ),
    Fault(
        id="X15",
        title="a gain that is drawn from the level of a silent file",
        settings={**ECAPA, "augment": True, "augment_prob": 1.0, "augmentation": [{"own": {}}]},
        plugins={"augmentation/own.py": LEVELLING},
        prepare=spoil(FIRST, silence),
        truths=(SPEECH,),
    ),
    Fault(
        id="X48",
        title="math.log10 of the peak of a silent file, in an augmentation",
        settings={**ECAPA, "augment": True, "augment_prob": 1.0, "augmentation": [{"own": {}}]},
        plugins={"augmentation/own.py": OF_PYTHON},
        prepare=spoil(FIRST, silence),
        truths=(SPEECH,),
    ),
)
