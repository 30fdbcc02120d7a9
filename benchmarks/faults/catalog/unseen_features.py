"""More features: logs in place, phases, vmap, learned constants."""

from fault import CODE, Fault, Place, Truth, exclude, marked
from sources import model, xvector
from voices import FIRST, silence, spoil

from catalog.shared import FILTERS, FORWARD, LAYER, WAV, gap

SILENT = (marked(), Place(files=(WAV,)))
LOG_IN_PLACE = xvector(
    features="""
    x = self.energies(x)
    x.div_(x.shape[1])
    x.log_()  #!
    x -= x.mean(dim=2, keepdim=True)  #!
    return x
    """,
)
PHASE = xvector(
    init="self.lag = 1",
    features="""
    spectrum = torch.stft(
        x,
        n_fft=400,
        hop_length=160,
        window=self.window,
        center=False,
        return_complex=True,
    )
    cross = spectrum[..., self.lag :] * spectrum[..., : -self.lag].conj()
    cross = cross / cross.abs()  #!
    advance = torch.einsum("bft,fm->bmt", cross.real, self.bank)
    level = self.energies(x)[..., self.lag :].add(1e-6).log()
    return level + 0.1 * advance
    """,
)
MAPPED = model(
    helper='''
    def standardise(wave):
        """One waveform (T,) at mean 0 and deviation 1."""
        centred = wave - wave.mean()
        power = centred.square().mean()
        return centred * power.rsqrt()  #!


    standardise_all = torch.func.vmap(standardise)
    ''',
    start="x = standardise_all(x)  #!",
)
POWER_LAW = xvector(
    init="""
    self.exponent = 0.7
    self.over = 2.0
    """,
    features="""
    def clean(energies):
        noise = energies.sort(dim=2).values[:, :, : energies.shape[2] // 5]
        return energies - self.over * noise.mean(dim=2, keepdim=True)

    return (
        clean(self.energies(x))
        .mul(10.0)
        .pow(self.exponent)  #!
        .clamp(max=50.0)
    )
    """,
)
LEARNED_FLOOR = xvector(
    init="self.floor = nn.Parameter(torch.full((bands, 1), 0.015))",
    features="""
    bands = self.energies(x) + self.floor
    x = torch.log(bands)  #!
    return x - x.mean(dim=2, keepdim=True)
    """,
)

FAULTS = (
    Fault(
        id="N01",
        title="log_() of a silent file's energies",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": LOG_IN_PLACE},
        prepare=spoil(FIRST, silence),
        truths=(Truth(FORWARD, FILTERS, SILENT, (CODE, exclude(WAV))),),
    ),
    Fault(
        id="N02",
        title="complex numbers of unit length, a drop-out of zeros",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": PHASE},
        prepare=spoil(FIRST, gap),
        truths=(Truth(FORWARD, FILTERS, SILENT, (CODE, exclude(WAV))),),
    ),
    Fault(
        id="N03",
        title="vmap over waveforms, one of them constant",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": MAPPED},
        prepare=spoil(FIRST, lambda samples: samples * 0.0 + 0.25),
        truths=(Truth(FORWARD, FILTERS, SILENT, (CODE, exclude(WAV))),),
    ),
    Fault(
        id="N04",
        title="spectral subtraction, then ** 0.7",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": POWER_LAW},
        truths=(Truth(FORWARD, ("model_forward", "frontend"), (marked("pow"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N05",
        title="log of energies and a learned floor that falls below 0",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": LEARNED_FLOOR},
        truths=(
            Truth(
                FORWARD,
                (*LAYER, "frontend"),
                (marked("log"), Place(parameters=("__S__.features.floor",))),
                (CODE,),
            ),
        ),
        status=3,
    ),
)
