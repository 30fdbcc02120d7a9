"""Held-out faults of plain arithmetic in layers, fp32: H67 to H72."""

from catalog_heldout_features import BACKWARD, FORWARD, FRONT, LAYER, of_layer, xvector
from sources import model
from voices import FIRST, spoil, times

FOURTH_POWER = xvector(
    features="""
    bands = self.energies(x)
    contrast = bands * bands  #!
    contrast = contrast / (contrast.mean(dim=2, keepdim=True) + 1e-6)
    return torch.log1p(contrast)
    """
)
SIGNED_GEM = model(
    init="self.power = nn.Parameter(torch.tensor(2.5))",
    middle="x = self.bn(x)",
    pool="x = (x ** self.power).mean(dim=2)  #!\nx = x.clamp(min=1e-6) ** 0.4",
)
CUMULATIVE = model(
    init="self.forget = nn.Conv1d(channels, channels, 1)",
    pool="""
    gates = F.softplus(self.forget(x) + 6.0)  # nothing keeps them below 1
    memory = gates.cumprod(dim=2)  #!
    x = (x * memory).sum(dim=2) / memory.sum(dim=2)  #!
    """,
)
WHITEN = model(
    init="self.bn.bias.data[3] = -30.0",
    pool="""
    x = x - x.mean(dim=(0, 2), keepdim=True)
    spread = (x * x).mean(dim=(0, 2), keepdim=True)
    x = (x * spread ** -0.5).amax(dim=2)  #!
    """,
)
RECURRENT = model(
    init="self.cell = nn.Linear(channels, channels, bias=False)\nnn.init.normal_(self.cell.weight, std=3.0)",
    pool="""
    state = torch.zeros_like(x[:, :, 0])
    for t in range(x.shape[2]):
        state = F.relu(self.cell(state) + x[:, :, t])  #!
    x = state / state.norm(dim=1, keepdim=True)  #!
    """,
)
NORM_OF_NOTHING = model(
    pool="""
    change = F.dropout(x.mean(dim=2), 0.7, self.training)
    change = torch.stack([part.pow(2).sum().pow(0.5) for part in change.flatten()])  #!
    x = change.view(len(x), -1)
    """,
)
FAULTS = (
    of_layer(
        *(
            "H67",
            "square of energies, a file of 32-bit integers as float",
            FORWARD,
            FRONT,
            ("mul", "div"),
            FOURTH_POWER,
        ),
        file=True,
        prepare=spoil(FIRST, times(2.0**31)),
    ),
    of_layer("H68", "GeM of signed activations", FORWARD, LAYER, ("pow",), SIGNED_GEM, every=True),
    of_layer(
        "H69", "a product over time", FORWARD, LAYER, ("cumprod", "mul", "div", "sum"), CUMULATIVE, True, fixes=()
    ),
    of_layer("H70", "whitening by ** -0.5, a dead channel", FORWARD, LAYER, ("pow", "mul"), WHITEN, every=True),
    of_layer(
        *("H71", "a recurrence that explodes in the forward pass", FORWARD, LAYER, (), RECURRENT),
        every=True,
    ),
    of_layer(
        *("H72", "roots in a comprehension, after dropout", BACKWARD, ("model_backward",), ("pow",), NORM_OF_NOTHING),
        every=True,
    ),
)
