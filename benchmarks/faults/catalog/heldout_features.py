"""Features: energies, cepstra, normalisation over frames."""

import voices
from fault import CODE, Fault, Place, Truth, exclude, marked
from sources import xvector
from voices import FIRST, spoil, times

from catalog.shared import FORWARD, WAV, gap


def late_start(samples):
    """Recorded only from the middle on."""
    samples[:8000] = 0.0


def click(samples):
    """Silence with one sample in it."""
    samples[:] = 0.0
    samples[6000] = 0.5


def hum(samples):
    """A tone of 100 Hz, its period a whole number of samples."""
    return 0.4 * voices.np.sin(2 * voices.np.pi * voices.np.arange(len(samples)) / 160)


MFCC = xvector(
    init="""
    order, place = torch.arange(float(bands)), torch.arange(float(bands))[:, None]
    self.register_buffer("dct", torch.cos(math.pi / bands * (place + 0.5) * order) * math.sqrt(2.0 / bands))
    self.register_buffer("lifter", 1.0 + 11.0 * torch.sin(math.pi * order / 22.0))
    """,
    features="""
    cepstra = torch.einsum("bmt,mk->bkt", self.energies(x).clamp(min=1e-8).log(), self.dct)
    cepstra = cepstra * self.lifter[:, None]
    energy = x.unfold(1, 400, 160).square().sum(dim=2)
    cepstra[:, 0] = 10.0 * torch.log10(energy)  #!
    return cepstra
    """,
)
PCEN = xvector(
    init="""
    self.alpha = nn.Parameter(torch.full((bands, 1), 0.98))
    self.delta = nn.Parameter(torch.full((bands, 1), 2.0))
    self.root = nn.Parameter(torch.full((bands, 1), 0.5))
    """,
    features="""
    energy, coefficient = self.energies(x), 0.025
    smooth = [energy[:, :, 0]]
    for t in range(1, energy.shape[2]):
        smooth.append((1 - coefficient) * smooth[-1] + coefficient * energy[:, :, t])
    gain = torch.stack(smooth, dim=2).pow(self.alpha)  #!
    return (energy / gain + self.delta).pow(self.root) - self.delta.pow(self.root)  #!
    """,
)
VOICED_CMVN = xvector(
    features="""
    rows = []
    for energies, wave in zip(self.energies(x).add(1e-6).log(), x):
        level = wave.unfold(0, 160, 160).square().mean(dim=1)[: energies.shape[1]]
        voiced = energies[:, : len(level)][:, level > 0.01 * level.max()]
        mean, deviation = voiced.mean(dim=1), voiced.std(dim=1)  #!
        rows.append((energies - mean[:, None]) / (deviation[:, None] + 1e-5))
    return torch.stack(rows)
    """,
)
SPEC_AUGMENT = xvector(
    features="""
    with torch.no_grad():
        bands = self.energies(x).add(1e-6).log()
        bands = bands - bands.mean(dim=2, keepdim=True)
        if self.training:
            for row in bands:
                width = int(torch.randint(0, self.bands + 1, ()))
                first = int(torch.randint(0, self.bands - width + 1, ()))
                row[first : first + width] = 0.0
        bands /= bands.square().mean(dim=(1, 2), keepdim=True).sqrt()  #!
    return bands
    """,
)
PERIODICITY = xvector(
    features="""
    frames = x.unfold(1, 800, 160)
    still = frames[..., :400]
    correlation = []
    for lag in range(40, 360, 20):
        moved = frames[..., lag : lag + 400]
        norms = still.norm(dim=-1) * moved.norm(dim=-1)
        correlation.append((still * moved).sum(dim=-1) / (norms + 1e-8))
    aperiodicity = (1.0 - torch.stack(correlation, dim=1).pow(2)).sqrt()  #!
    return aperiodicity
    """,
)
FRONT = ("frontend", "model_forward", "input")
FOURTH_POWER = xvector(
    features="""
    bands = self.energies(x)
    contrast = bands * bands  #!
    contrast = contrast / (contrast.mean(dim=2, keepdim=True) + 1e-6)
    return torch.log1p(contrast)
    """
)

FAULTS = (
    Fault(
        id="H01",
        title="MFCC: frame energy in dB, a drop-out of zeros",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": MFCC},
        prepare=spoil(FIRST, gap),
        truths=(Truth(FORWARD, FRONT, (marked("log10", "log"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="H02",
        title="PCEN: smoothed energy 0 in a file that starts late",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": PCEN},
        prepare=spoil(FIRST, late_start),
        truths=(Truth(FORWARD, FRONT, (marked("div", "pow"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="H03",
        title="CMVN over voiced frames, one of them",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": VOICED_CMVN},
        prepare=spoil(FIRST, click),
        truths=(Truth(FORWARD, FRONT, (marked("std", "var"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="H04",
        title="SpecAugment masks all, then normalises",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": SPEC_AUGMENT},
        truths=(Truth(FORWARD, FRONT[:2], (marked("div"),), (CODE,)),),
    ),
    Fault(
        id="H05",
        title="root of 1 - r^2 of a pure tone",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": PERIODICITY},
        prepare=spoil(FIRST, hum),
        truths=(Truth(FORWARD, FRONT, (marked("sqrt", "rsub", "sub"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="H64",
        title="level of a silent file in dB, as an extra channel",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={
            "models/unseen.py": xvector(
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
            )
        },
        prepare=spoil(FIRST, voices.silence),
        truths=(
            Truth(
                ("loss_nonfinite",),
                ("frontend", "model_forward", "input"),
                (marked("log10", "log"), Place(files=(WAV,))),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="H67",
        title="square of energies, a file of 32-bit integers as float",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": FOURTH_POWER},
        prepare=spoil(FIRST, times(2.0**31)),
        truths=(Truth(FORWARD, FRONT, (marked("mul", "div"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
)
