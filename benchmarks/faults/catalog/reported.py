"""Reports from public trackers, made small."""

from fault import CODE, Fault, Place, Truth, exclude, marked, put
from sources import loss, model, optimizer, schedule, xvector
from voices import FIRST, silence, spoil

from catalog.heldout_losses import with_keys
from catalog.shared import BACKWARD, BRAIN, COSINE, FORWARD, HALF, LAYER, LOSS, PLAIN, SGD, SLOPE, STOPPED, WAV

CMVN = xvector(
    init='self.register_buffer("equaliser", torch.linspace(-3.0, 3.0, bands)[:, None])',
    features="""
    x = self.energies(x).add(1e-10).log() + self.equaliser
    mean = x.mean(dim=2, keepdim=True)
    variance = x.square().mean(dim=2, keepdim=True) - mean.square()
    deviation = variance.sqrt()  #!
    return (x - mean) / deviation  #!
    """,
)
TRANSCRIPTS = loss(
    COSINE,
    """
    logits = self.scale * cosine
    log_p = self.tokens(x).view(len(x), 4, 5).log_softmax(dim=2).transpose(0, 1)  # four frames, a blank and a to d
    length = 2 + label % 4  # letters of what is said
    words = torch.tensor([1, 2, 3, 4, 1]).expand(len(x), 5)
    spelt = F.ctc_loss(log_p, words, torch.full_like(length, 4), length)  #!
    loss = F.cross_entropy(logits, label) + 0.1 * spelt
    """,
    init="self.tokens = nn.Linear(nOut, 20)",
)
SMOOTH_L1 = with_keys(
    loss(
        COSINE,
        """
        off = (1.0 - cosine.gather(1, label[:, None])).abs()
        small = 0.5 * off.square() / self.beta  #!
        smooth = torch.where(off < self.beta, small, off - 0.5 * self.beta)  #!
        logits = self.scale * cosine
        loss = F.cross_entropy(logits, label) + smooth.mean()
        """,
    ),
    beta=0.0,
)
FLOW = loss(
    COSINE,
    """
    z = F.normalize(x) @ self.mix
    gain = torch.logdet(self.mix)  #!
    logits = self.scale * cosine
    loss = F.cross_entropy(logits, label) + z.square().sum(dim=1).mean() - 1e-8 * gain
    """,
    init="""
    self.mix = nn.Parameter(torch.eye(nOut))
    self.mix.data[0, 0] = 0.004  # after thousands of steps
    """,
)
FEED_FORWARD = model(
    init="""
    self.wi = nn.Linear(channels, 64)
    self.wo = nn.Linear(64, channels)
    nn.init.constant_(self.wi.weight, 20.0)
    nn.init.constant_(self.wo.weight, 20.0)
    """,
    end="""
    h = F.relu(self.wi(x))
    h = self.wo(h)  #!
    x = x + h
    x = F.layer_norm(x, x.shape[-1:])
    return self.fc(x)
    """,
)
DISTIL = loss(
    COSINE,
    """
    spare = torch.full((len(x), 1), -math.inf)  # one more class, for an even number of them
    logits = torch.cat([self.scale * cosine, spare], dim=1)
    teacher = torch.cat([5.0 * cosine.detach(), spare], dim=1)
    wanted = F.softmax(teacher, dim=-1)
    log_p = F.log_softmax(logits, dim=-1)
    loss = -(wanted * log_p).sum(dim=1).mean()  #!
    """,
)
CLIPS = optimizer(
    "UnitClip",
    "SGD with gradients clipped by the norm of their weights.",
    """
    def update(self, p, g, state, group):
        length = p.norm()
        slope = g.norm()
        factor = (0.01 * length / slope).clamp(max=1.0)  #!
        p.add_(g * factor, alpha=-group["lr"])  #!
    """,
)
DEAD_UNIT = model(
    init="""
    self.bn.bias.data[3] = -30.0
    self.spare = nn.Parameter(torch.zeros(4))
    """,
    end="return self.fc(x) + 0.0 * self.spare.sum()",
)
LONG_WARM_UP = schedule(
    "Linear warm-up to the rate, cosine after it.",
    ", warm_steps=12500",
    """
    if step < warm_steps:
        return step / warm_steps
    return 0.5 * (1.0 + np.cos(np.pi * min(1.0, step / warm_steps - 1.0)))
    """,
)
POSITIVE = model(
    middle="""
    x = 100.0 * self.bn(x)
    x = torch.where(x <= 0, torch.exp(x), 1.0 + x)  #!
    """
)
STOI = model(
    start="""
    energy = x.unfold(1, 400, 160).square().mean(dim=2)  # (B, frames)
    heard = (energy > 1e-4 * energy.amax(dim=1, keepdim=True)).to(x.dtype)
    """,
    pool="""
    x = x * heard[:, None]  # without the silent frames
    parts = x[:, :, :54].unflatten(2, (9, 6))  # segments of six frames
    length = torch.sqrt(parts.square().sum(dim=3, keepdim=True)) + 1e-8  #!
    x = (parts / length).mean(dim=(2, 3))
    """,
)

FAULTS = (
    # https://github.com/xinjli/allosaurus/issues/64: variance by difference in the features' normalisation falls below
    # 0, or is 0; the file was one of Common Voice. Use the library's deviation, and do not divide by 0.
    Fault(
        id="R01",
        title="mean and variance normalisation, variance by difference, of a silent file",
        settings={"model": "reported", "nan_patience": 1000},
        plugins={"models/reported.py": CMVN},
        prepare=spoil(FIRST, silence),
        truths=(
            Truth(
                ("loss_nonfinite", "grad_nonfinite"),
                (*LAYER, *SLOPE, "input", "frontend"),
                (marked("sqrt", "div"), Place(files=(WAV,))),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
    # https://github.com/wenet-e2e/wenet/pull/2299: fewer frames than the transcript needs. Set zero_infinity.
    Fault(
        id="R02",
        title="CTC, a transcript longer than the frames",
        settings={"trainfunc": "reported", "nan_patience": 4},
        plugins={"loss/reported.py": TRANSCRIPTS},
        truths=(Truth(FORWARD, LOSS, (marked("ctc_loss", "_ctc_loss"),), (CODE,)),),
        status=3,
    ),
    # https://github.com/pytorch/pytorch/issues/96813: beta = 0 divides by it in the branch that is not taken. Use L1.
    # Written by hand here, since only PyTorch's own kernel for a GPU did so.
    Fault(
        id="R03",
        title="smooth L1 with beta 0",
        settings={"trainfunc": "reported", "nan_patience": 4},
        plugins={"loss/reported.py": SMOOTH_L1},
        truths=(
            Truth(
                BACKWARD,
                LOSS,
                (marked("div", "where"), Place(keys=("beta",))),
                (CODE, put("beta", lambda v: v > 0)),
            ),
        ),
        status=3,
    ),
    # https://github.com/NVIDIA/waveglow/issues/35 and /49: after thousands of steps the determinant falls below 0,
    # where its logarithm is NaN. Take the logarithm of its magnitude (one user still met a NaN later on).
    Fault(
        id="R04",
        title="logdet of a learned matrix whose determinant falls below 0",
        settings={"trainfunc": "reported", "nan_patience": 4, "max_epoch": 4},
        plugins={"loss/reported.py": FLOW},
        truths=(
            Truth(
                FORWARD,
                LOSS,
                (marked("logdet", "log", "_linalg_slogdet", "linalg_slogdet"), Place(parameters=("__L__.mix",))),
                (CODE,),
            ),
        ),
        status=3,
    ),
    # https://github.com/huggingface/transformers/issues/5651: the second layer of T5's feed-forward block gives 66,246
    # where 65,504 is the largest fp16 number. Full precision there, or bfloat16.
    Fault(
        id="R05",
        title="T5's feed-forward block overflows fp16",
        settings={"model": "reported", "nan_patience": 4, **HALF},
        plugins={"models/reported.py": FEED_FORWARD},
        truths=(
            Truth(
                FORWARD,
                ("precision",),
                (marked("linear", "addmm", "mm"),),
                (CODE, put("mixedprec", lambda v: not v), put("amp_dtype", lambda v: v == BRAIN["amp_dtype"])),
            ),
        ),
        status=3,
    ),
    # https://github.com/OpenBMB/ModelCenter/issues/14: padding of the vocabulary has logits of -inf, and 0 * -inf is
    # NaN in the cross-entropy with a teacher. Leave the padding out.
    Fault(
        id="R06",
        title="distillation over a padded vocabulary: 0 times -inf",
        settings={"trainfunc": "reported", "nan_patience": 4},
        plugins={"loss/reported.py": DISTIL},
        truths=(Truth(FORWARD, LOSS, (marked("mul"),), (CODE,)),),
        status=3,
    ),
    # https://github.com/mosaicml/composer/pull/924: norms of weight and gradient are both 0, and clamp(max=1) keeps
    # the NaN of 0/0. Clamp the norm of the gradient from below.
    Fault(
        id="R07",
        title="adaptive gradient clipping: 0/0 before clamp(max=1)",
        settings={"model": "Spare", "optimizer": "reported", "nan_patience": 4},
        plugins={"models/Spare.py": DEAD_UNIT, "optimizer/reported.py": CLIPS},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked("div"), Place(parameters=("__S__.spare",))),
                (CODE, put("optimizer", lambda v: v != "reported")),
            ),
        ),
        status=3,
    ),
    # https://github.com/YunYang1994/TensorFlow2.0-Examples/issues/8: the warm-up is longer than the reporter thought,
    # and the rate rises until the loss is NaN. A lower rate.
    Fault(
        id="R08",
        title="a warm-up that never ends, to a rate that is too high",
        settings={**SGD, "model": "Plain", "scheduler": "reported", "lr": 1e6},
        plugins={"models/Plain.py": PLAIN, "scheduler/reported.py": LONG_WARM_UP},
        truths=(
            Truth(
                STOPPED,
                ("optimizer",),
                (Place(keys=("lr", "scheduler", "warm_steps")),),
                (put("lr", lambda v: 0 < v <= 1e5), put("scheduler", lambda v: v != "reported")),
            ),
        ),
        status=3,
    ),
    # https://github.com/pytorch/pytorch/issues/68425: exp() overflows in the branch that where() does not take, and
    # its slope is 0 times Inf. Give exp() a harmless operand there.
    Fault(
        id="R09",
        title="where(x <= 0, exp(x), 1 + x) at 100",
        settings={"model": "reported", "nan_patience": 4},
        plugins={"models/reported.py": POSITIVE},
        truths=(Truth(BACKWARD, SLOPE, (marked("exp", "where"),), (CODE,)),),
        status=3,
    ),
    # https://github.com/mpariente/pytorch_stoi/pull/14: EPS is added after the root, whose slope at 0 is Inf. Add it
    # before.
    Fault(
        id="R10",
        title="lengths of silent segments, eps added after the root",
        settings={"model": "reported", "nan_patience": 1000},
        plugins={"models/reported.py": STOI},
        prepare=spoil(FIRST, silence),
        truths=(Truth(BACKWARD, SLOPE, (marked("sqrt"),), (CODE,)),),
    ),
)
