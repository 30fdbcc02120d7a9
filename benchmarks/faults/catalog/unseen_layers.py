"""More layers: checkpointed blocks, functions and hooks of their own, parametrised weights."""

from fault import CODE, Fault, Place, Truth, marked
from sources import model

from catalog.shared import BACKWARD, DEAD, FORWARD, LAYER, SLOPE

CHECKPOINT = "from torch.utils.checkpoint import checkpoint"
REENTRANT = model(
    helper=f"""
    {CHECKPOINT}


    class Companding(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.wide = nn.Conv1d(channels, 2 * channels, 1)
            self.narrow = nn.Conv1d(2 * channels, channels, 1)

        def body(self, x):
            x = F.relu(self.wide(x))
            x = F.dropout(x, 0.25, self.training)
            x = torch.sqrt(x)  #!
            return self.narrow(x)

        def forward(self, x):
            return x + checkpoint(self.body, x, use_reentrant=True)  #!
    """,
    init="self.companding = Companding(channels)",
    middle="x = self.companding(F.relu(self.bn(x)))",
)
NOT_REENTRANT = model(
    helper=f"""
    {CHECKPOINT}


    def peak_normalise(x, dim=2):
        peak = x.amax(dim=dim, keepdim=True)
        return x / peak  #!
    """,
    init=f"{DEAD}\nself.mix = nn.Conv1d(channels, channels, 1)",
    middle="""
    x = F.relu(self.bn(x))
    x = checkpoint(lambda h: self.mix(peak_normalise(h)), x, use_reentrant=False)  #!
    """,
)
BALANCE = model(
    helper='''
    class Balance(torch.autograd.Function):
        """Give the gradient of every channel the same length."""

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            length = grad.pow(2).sum(dim=(0, 2), keepdim=True).sqrt()
            return grad.div(length)  #!


    balance = Balance.apply
    ''',
    init=DEAD,
    middle="""
    x = balance(x)  #!
    x = F.relu(self.bn(x))
    """,
)
FAKE_QUANT = model(
    helper='''
    class FakeQuant(torch.autograd.Function):
        """Round to 8 bit, straight through."""

        @staticmethod
        def forward(ctx, x, bits):
            top = 2 ** (bits - 1) - 1
            step = x.abs().amax(dim=(0, 2), keepdim=True) / top
            return (
                torch.round(x / step)  #!
                .clamp(-top, top)
                .mul(step)
            )

        @staticmethod
        def backward(ctx, grad):
            return grad, None
    ''',
    init=DEAD,
    middle="""
    x = F.relu(self.bn(x))
    x = FakeQuant.apply(x, 8)  #!
    """,
)
ZERO_WEIGHT = model(
    init="""
    residual = nn.Linear(channels, channels)
    nn.init.zeros_(residual.weight)  #!
    self.residual = nn.utils.parametrizations.weight_norm(residual)  #!
    """,
    pool="""
    x = x.mean(dim=2)
    x = x + self.residual(x)  #!
    """,
)
ZERO_NAMES = tuple(f"__S__.residual.parametrizations.weight.original{number}" for number in (0, 1))
IN_PLACE = model(
    init=DEAD,
    middle="""
    x = F.relu(self.bn(x))
    with torch.no_grad():
        spread, centre = torch.std_mean(x, dim=2, keepdim=True)
    x = x - centre
    x /= spread  #!
    """,
    pool="x = x.amax(dim=2)",
)
RMS_POOLING = model(
    init="nn.init.zeros_(self.bn.weight)  # the branch starts at 0",
    middle="x = self.bn(x)",
    pool="""
    x = (
        x.square()
        .mean(dim=2)
        .sqrt_()  #!
    )
    """,
)
MODULE_HOOK = model(
    helper='''
    def flatten_gradient(module, grad_input, grad_output):
        """Take the root of each gradient and keep its sign."""
        (grad, *others) = grad_input
        flat = grad * grad.abs().pow(-0.5)  #!
        return (0.01 * flat, *others)
    ''',
    init=f"""
    {DEAD}
    self.bn.register_full_backward_hook(flatten_gradient)  #!
    """,
)
TABLE = model(
    helper="""
    def positions(channels, longest=400, filled=50):
        table = torch.empty(channels, longest)
        table.fill_(math.inf)  # what fresh memory may hold
        steps = torch.arange(filled)  #!
        for channel in range(channels):
            table[channel, :filled] = torch.sin(steps / (channel + 1.0))
        return table  #!
    """,
    init='self.register_buffer("positions", positions(channels), persistent=False)  #!',
    middle="""
    x = F.relu(self.bn(x))
    x = x + self.positions[:, : x.shape[2]]  #!
    """,
)

FAULTS = (
    Fault(
        id="N16",
        title="root of dropped units, checkpointed with use_reentrant=True",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": REENTRANT},
        truths=(Truth(BACKWARD, SLOPE, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N17",
        title="peak of a dead channel, checkpointed with use_reentrant=False",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": NOT_REENTRANT},
        truths=(Truth(FORWARD, LAYER, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N18",
        title="backward() divides by the length of a gradient of 0",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": BALANCE},
        truths=(Truth(BACKWARD, SLOPE, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N19",
        title="forward() of a rounding function: step 0",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": FAKE_QUANT},
        truths=(Truth(FORWARD, LAYER, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N20",
        title="weight_norm() of a layer that starts at 0",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": ZERO_WEIGHT},
        truths=(
            Truth(
                FORWARD,
                LAYER,
                (
                    marked(),
                    Place(modules=("__S__.residual", "__S__.residual.parametrizations.weight.0")),
                    Place(parameters=ZERO_NAMES),
                ),
                (CODE,),
            ),
        ),
        status=3,
    ),
    Fault(
        id="N21",
        title="/= of a deviation that is 0, under no_grad",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": IN_PLACE},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N22",
        title="sqrt_() at the end of a chain, a branch that starts at 0",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": RMS_POOLING},
        truths=(Truth(BACKWARD, SLOPE, (marked("sqrt"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N23",
        title="a full backward hook: 0 times 0 ** -0.5",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": MODULE_HOOK},
        truths=(Truth(BACKWARD, SLOPE, (marked(), Place(modules=("__S__.bn",))), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N24",
        title="a table of positions that is filled in part",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": TABLE},
        truths=(
            Truth(
                FORWARD,
                ("state", "model_forward"),
                (marked(), Place(parameters=("__S__.positions",))),
                (CODE,),
            ),
        ),
        status=3,
    ),
)
