"""More 16-bit arithmetic."""

from fault import CODE, FULL_PRECISION, Fault, Place, Truth, exclude, marked, put
from sources import model, xvector
from voices import FIRST, spoil, times

from catalog.shared import FORWARD, HALF, PRECISION, STOPPED, WAV

HALF_FLOOR = xvector(
    init="""
    self.register_buffer("floor", torch.tensor(1e-8))
    self.half_from_here = True
    """,
    features="""
    energies = self.energies(x)
    floor = self.floor
    if self.half_from_here:
        energies, floor = energies.half(), floor.half()  #!
    logarithms = torch.log(  #!
        energies + floor  #!
    )
    return logarithms.float()
    """,
)
HALF_MODEL = model().replace(
    "def MainModel(nOut=12, **kwargs):\n    return TinyNet(nOut, **kwargs)",
    '''class HalfNet(nn.Module):
    """Keep weights and activations in 16 bit, to save memory."""

    def __init__(self, net):
        super().__init__()
        self.net = net.half()  # FAULT

    def forward(self, x):
        return self.net(x.half()).float()


def MainModel(nOut=12, **kwargs):
    return HalfNet(TinyNet(nOut, **kwargs))''',
)
BILINEAR = model(
    init="self.gain = 100.0",
    pool="""
    x = self.gain * x
    pairs = torch.einsum(  #!
        "bct,bdt->bcd",
        x,
        x,
    )
    pairs = pairs[(slice(None), *torch.triu_indices(8, 8))] / x.shape[2]
    x = torch.log1p(pairs)
    """,
    width=36,
)

FAULTS = (
    Fault(
        id="N34",
        title="a floor of 1e-8 that half() makes 0, a quiet file",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": HALF_FLOOR},
        prepare=spoil(FIRST, times(1e-3)),
        truths=(
            Truth(
                FORWARD,
                ("precision", "model_forward", "frontend", "input"),
                (marked(), Place(files=(WAV,))),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="N35",
        title="half() of a whole model, Adam's eps of 1e-8 is 0",
        settings={"fused": False, "model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": HALF_MODEL},
        truths=(
            Truth(
                STOPPED,
                ("precision", "optimizer", "state"),
                (
                    marked(),
                    Place(keys=("eps", "optimizer")),
                    Place(
                        parameters=tuple(
                            f"__S__.net.{layer}.{kind}" for layer in ("conv", "bn", "fc") for kind in ("weight", "bias")
                        )
                    ),
                ),
                (CODE, put("eps", lambda v: v >= 1e-6), put("optimizer", lambda v: v == "sgd")),
            ),
        ),
        status=3,
    ),
    Fault(
        id="N36",
        title="bilinear pooling in fp16, einsum over the frames",
        settings={**HALF, "model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": BILINEAR},
        truths=(Truth(FORWARD, PRECISION, (marked("einsum", "bmm", "matmul"),), (CODE, *FULL_PRECISION)),),
        status=3,
    ),
)
