"""More pooling over time: masks, attention, generators, counters, matrices."""

from fault import CODE, Fault, Place, Truth, exclude, marked
from sources import block, model
from voices import FIRST, spoil, times

from catalog.shared import BACKWARD, DEAD, FILTERS, FORWARD, LAYER, SLOPE, WAV

HELPER = block(
    '''
    """Pooling that our recipes share."""

    import torch


    def moments(x, dim):
        """Mean and deviation."""
        return x.mean(dim=dim), x.std(dim=dim)


    def pool_statistics(x: torch.Tensor) -> torch.Tensor:
        """Means and coefficients of variation, (B, C, T) -> (B, 2 C)."""
        mean, deviation = moments(x, dim=-1)
        variation = deviation / mean  #!
        return torch.cat([mean, torch.tanh(variation)], dim=-1)
    ''',
    0,
)
WITH_HELPER = model(
    helper="from helpers.pooling import pool_statistics",
    init=DEAD,
    pool="x = pool_statistics(x)",
    width=16,
)
VOICED = model(
    start="""
    def voiced_frames(wave, threshold=0.002):
        frames = wave.unfold(1, 400, 160)
        level = frames.square().mean(dim=2).sqrt()
        return (level > threshold).to(wave.dtype)

    mask = voiced_frames(x)
    """,
    pool="""
    total = torch.einsum("bct,bt->bc", x, mask)
    x = torch.div(  #!
        total,
        torch.einsum("bt->b", mask).unsqueeze(1),
    )  #!
    """,
)
LOUD_FRAMES = "loud = x.unfold(1, 400, 160).abs().amax(dim=2) > 0.002  # (B, frames)"
SDPA = model(
    init="self.qkv = nn.Linear(channels, 3 * channels)",
    start=LOUD_FRAMES,
    pool="""
    query, key, value = self.qkv(x.transpose(1, 2)).chunk(3, dim=2)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=loud.unsqueeze(1))  #!
    attended = attended / attended.norm(dim=2, keepdim=True)  #!
    x = attended.mean(dim=1)
    """,
)
MULTI_HEAD = model(
    init="self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)",
    start=LOUD_FRAMES,
    pool="""
    x = x.transpose(1, 2)
    attended, weights = self.attention(x, x, x, key_padding_mask=~loud)  #!
    self.last_weights = weights.detach()
    x = (x + attended).mean(dim=1)
    """,
)
SURVIVAL = model(
    init="self.hazard = nn.Conv1d(channels, channels, 1)\nnn.init.constant_(self.hazard.bias, 2.5)",
    pool="""
    survival = (1.0 - torch.sigmoid(self.hazard(x))).cumprod(dim=2)  #!
    relative = survival / survival[:, :, -1:]  #!
    x = (x * relative).sum(dim=2) / relative.sum(dim=2)  #!
    """,
)
ENTROPY = model(
    init="""
    self.gru = nn.GRU(channels, channels, batch_first=True)
    self.score = nn.Linear(channels, 1)
    nn.init.normal_(self.score.weight, std=40.0)
    """,
    pool="""
    states, _ = self.gru(x.transpose(1, 2))
    weights = F.softmax(10.0 * self.score(states), dim=1)
    entropy = -(weights * weights.log()).sum(dim=1)  #!
    x = (weights * states).sum(dim=1) + 0.1 * entropy
    """,
)
OWN_GENERATOR = model(
    init="self.rng = torch.Generator().manual_seed(11)",
    pool="""
    if self.training:
        kept = torch.rand(x.shape[0], 1, x.shape[2], generator=self.rng) > 0.95
        x = (x * kept).sum(dim=2) / kept.sum(dim=2)  #!
    else:
        x = x.mean(dim=2)
    """,
)
COUNTER = model(
    init="self.score = nn.Conv1d(channels, 1, 1)\nself.calls = 0",
    pool="""
    temperature = 1.0
    if self.training:
        self.calls += 1
        temperature = max(0.0, 1.0 - 0.1 * self.calls)  #!
    scores = self.score(x) / temperature  #!
    x = (x * scores.softmax(dim=2)).sum(dim=2)  #!
    """,
)
PRECISION_MATRIX = model(
    init=DEAD,
    pool="""
    mean = x.mean(dim=2, keepdim=True)
    spread = (x - mean) @ (x - mean).mT / (x.shape[2] - 1)
    precision, _ = torch.linalg.inv_ex(spread)  #!
    x = (precision @ mean).squeeze(2).tanh()
    """,
)
PRINCIPAL = model(
    init="self.conv = nn.Conv1d(1, channels, 400, stride=160, bias=False)",
    pool="""
    spread = x @ x.mT / x.shape[2]
    values, axes = torch.linalg.eigh(spread)  #!
    weights = values.clamp(min=0.0).add(1e-3).log()
    x = torch.einsum("bij,bj->bij", axes, weights).flatten(1)
    """,
    middle="x = x.tanh()",
    width=64,
)

FAULTS = (
    Fault(
        id="N06",
        title="deviation over mean of a dead channel, in a package of helpers",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": WITH_HELPER, "helpers/__init__.py": "", "helpers/pooling.py": HELPER},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N07",
        title="einsum over the voiced frames of a quiet file",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": VOICED},
        prepare=spoil(FIRST, times(1e-3)),
        truths=(Truth(FORWARD, FILTERS, (marked("div"), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="N08",
        title="fused attention to nothing gives 0, then unit length",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": SDPA},
        prepare=spoil(FIRST, times(1e-3)),
        truths=(Truth(FORWARD, FILTERS, (marked(), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
    Fault(
        id="N09",
        title="a product over time that vanishes, as a divisor",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": SURVIVAL},
        truths=(Truth(FORWARD, LAYER, (marked("div", "cumprod", "mul", "sum"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N10",
        title="padding mask over all frames, nn.MultiheadAttention",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": MULTI_HEAD},
        prepare=spoil(FIRST, times(1e-3)),
        truths=(
            Truth(
                FORWARD,
                FILTERS,
                (marked(), Place(files=(WAV,)), Place(modules=("__S__.attention", "attention"))),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    Fault(
        id="N11",
        title="entropy of attention after a GRU, a weight of 0",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": ENTROPY},
        truths=(Truth(FORWARD, LAYER, (marked("log", "mul"),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N12",
        title="frames dropped by a generator of its own, now and then all",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": OWN_GENERATOR},
        truths=(Truth(FORWARD, LAYER, (marked("div"),), (CODE,)),),
    ),
    Fault(
        id="N13",
        title="a temperature that is 0 at the tenth call",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": COUNTER},
        truths=(Truth(FORWARD, LAYER, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N14",
        title="inverse of a singular covariance, info not looked at",
        settings={"model": "unseen", "nan_patience": 4},
        plugins={"models/unseen.py": PRECISION_MATRIX},
        truths=(Truth(FORWARD, LAYER, (marked(),), (CODE,)),),
        status=3,
    ),
    Fault(
        id="N15",
        title="eigenvectors of equal eigenvalues, a silent file",
        settings={"model": "unseen", "nan_patience": 1000},
        plugins={"models/unseen.py": PRINCIPAL},
        prepare=spoil(FIRST, times(0.0)),
        truths=(Truth(BACKWARD, SLOPE, (marked(), Place(files=(WAV,))), (CODE, exclude(WAV))),),
    ),
)
