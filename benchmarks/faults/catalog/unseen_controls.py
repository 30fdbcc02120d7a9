"""More runs of which nothing may be said: oddities that look dangerous."""

from fault import Fault
from sources import loss, model, xvector
from voices import FIRST, silence, spoil, times

from catalog.shared import COSINE, DEAD, HALF

MASKED_ATTENTION = model(
    init="self.qkv = nn.Linear(channels, 3 * channels)",
    start="loud = x.unfold(1, 400, 160).abs().amax(dim=2) > 0.002",
    pool="""
    query, key, value = self.qkv(x.transpose(1, 2)).chunk(3, dim=2)
    mask = torch.zeros_like(loud, dtype=x.dtype).masked_fill(~loud, -math.inf).unsqueeze(1)
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # 0 for a row that attends to nothing
    x = x.mean(dim=1)
    """,
)
SAFE_OPERAND = model(
    init=DEAD,
    pool="""
    spread = x.var(dim=2)
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    deviation = torch.where(spread > 0, safe.sqrt() + 0.1 * safe.log(), torch.zeros_like(spread))
    x = x.mean(dim=2) + deviation
    """,
)
REPLACED = xvector(
    features="""
    energies = self.energies(x)
    share = energies / energies.sum(dim=1, keepdim=True)  # 0/0 in silence
    return torch.nan_to_num(share.log(), nan=-10.0, neginf=-10.0).clamp(min=-10.0)
    """,
)
UNUSED_BUFFER = model(
    init="""
    self.register_buffer("last_level", torch.full((channels,), math.nan), persistent=False)
    self.register_buffer("longest", torch.tensor(math.inf), persistent=False)
    """,
    middle="""
    x = F.relu(self.bn(x))
    limited = torch.minimum(x, self.longest)  # no limit
    x = limited + 0.0 * x
    """,
)
HUGE_LOGITS = loss(
    COSINE,
    """
    logits = 1e12 * cosine
    loss = F.cross_entropy(logits, label)
    """,
)
HALF_LAYER = model(
    init="""
    self.projection = nn.Conv1d(channels, channels, 1).half().requires_grad_(False)
    """,
    middle="""
    x = F.relu(self.bn(x))
    x = x + self.projection(x.half()).float()
    """,
)
CHECKPOINTS = model(
    helper="from torch.utils.checkpoint import checkpoint",
    init="self.blocks = nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=1) for _ in range(3))",
    middle="""
    x = F.relu(self.bn(x))
    for number, block in enumerate(self.blocks):

        def body(h, block=block):
            return F.dropout(F.relu(block(h)), 0.3, self.training)

        x = x + checkpoint(body, x, use_reentrant=number == 1)
    """,
)
NORMED_LSTM = model(
    init="""
    self.lstm = nn.LSTM(channels, channels, batch_first=True, bidirectional=True)
    self.squeeze = nn.utils.parametrizations.weight_norm(nn.Linear(2 * channels, channels))
    self.bn.register_full_backward_hook(lambda module, inward, outward: tuple(g.clamp(-1, 1) for g in inward))
    """,
    pool="""
    states, (last, cell) = self.lstm(50.0 * x.transpose(1, 2))  # saturates, and stays finite
    x = self.squeeze(states).mean(dim=1)
    """,
)
OWN_DROPOUT = model(
    init="""
    self.rng = torch.Generator().manual_seed(4)
    self.calls = 0
    """,
    pool="""
    temperature = 1.0
    if self.training:
        self.calls += 1
        temperature = max(0.05, 1.0 - 0.2 * self.calls)
        kept = torch.rand(x.shape[0], 1, x.shape[2], generator=self.rng) > 0.9
        kept[:, :, 0] = True  # one frame stays
        x = torch.where(kept, x, -math.inf)
    x = (x / temperature).amax(dim=2) * temperature
    """,
)
NEIGHBOURS = loss(
    COSINE,
    """
    same = (label[:, None] == label[None, :]).to(x.dtype)
    graph = (same - torch.eye(len(x))).to_sparse()
    degree = torch.sparse.sum(graph, dim=1).to_dense()
    smooth = torch.sparse.mm(graph, x) / degree.clamp(min=1.0)[:, None]
    logits = self.scale * cosine
    pull = ((x - smooth).square().sum(dim=1) * (degree > 0)).mean()
    loss = F.cross_entropy(logits, label) + 0.01 * pull
    """,
)
HARD_MINING = loss(
    COSINE,
    """
    logits = self.scale * cosine
    own = F.one_hot(label, self.classes).bool()
    hardest = cosine.masked_fill(own, -math.inf).amax(dim=1)
    easiest = cosine.masked_fill(~own, math.inf).amin(dim=1)
    violations = hardest - easiest + self.margin
    active = violations[violations > 1.9]  # often none
    extra = active.mean() if len(active) else violations.new_zeros(())
    loss = F.cross_entropy(logits, label) + extra
    """,
)
RIDGE = xvector(
    features="""
    spectrum = torch.stft(x, 400, 160, window=self.window, center=False, return_complex=True)
    turned = spectrum / spectrum.abs().clamp(min=1e-6)
    phase = torch.einsum("bft,fm->bmt", turned.real, self.bank)
    return self.energies(x).add(1e-6).log() + 0.01 * phase
    """,
    pooling="""
    x = x - x.mean(dim=2, keepdim=True)
    spread = x @ x.mT / x.shape[2] + 0.1 * torch.eye(x.shape[1])
    factor = torch.linalg.cholesky(spread)
    return factor.flatten(1) + torch.linalg.slogdet(spread).logabsdet[:, None]
    """,
)

FAULTS = (
    Fault(
        id="C30",
        title="fused attention of a quiet file to nothing",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": MASKED_ATTENTION},
        prepare=spoil(FIRST, times(1e-3)),
    ),
    Fault(
        id="C31",
        title="where() with a safe operand on both sides",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": SAFE_OPERAND},
    ),
    Fault(
        id="C32",
        title="0/0 of a silent file, replaced by nan_to_num",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": REPLACED},
        prepare=spoil(FIRST, silence),
    ),
    Fault(
        id="C33",
        title="buffers of NaN and Inf that do no harm",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": UNUSED_BUFFER},
    ),
    Fault(
        id="C34",
        title="logits of 1e12",
        settings={"trainfunc": "unseen"},
        plugins={"loss/unseen.py": HUGE_LOGITS},
    ),
    Fault(
        id="C35",
        title="a frozen layer in half precision",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": HALF_LAYER},
    ),
    Fault(
        id="C36",
        title="checkpointed blocks of both kinds with dropout, fp16",
        settings={**HALF, "model": "unseen"},
        plugins={"models/unseen.py": CHECKPOINTS},
    ),
    Fault(
        id="C37",
        title="a saturated LSTM, weight_norm, a hook that clips",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": NORMED_LSTM},
    ),
    Fault(
        id="C38",
        title="a generator and a counter of its own, -inf for dropped frames",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": OWN_DROPOUT},
    ),
    Fault(
        id="C39",
        title="sparse.mm over a graph, rows without neighbours guarded",
        settings={"trainfunc": "unseen"},
        plugins={"loss/unseen.py": NEIGHBOURS},
    ),
    Fault(
        id="C40",
        title="Inf as a sentinel, empty selections avoided",
        settings={"trainfunc": "unseen"},
        plugins={"loss/unseen.py": HARD_MINING},
    ),
    Fault(
        id="C41",
        title="complex units and a Cholesky factor, both with a floor",
        settings={"model": "unseen"},
        plugins={"models/unseen.py": RIDGE},
        prepare=spoil(FIRST, silence),
    ),
)
