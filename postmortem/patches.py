"""Function modes that change how chosen operations compute during a replay, and nothing outside it."""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
# What CUDA's autocast computes in fp32 (PyTorch documentation, "CUDA Ops that can autocast to float32"); the CPU's
# autocast leaves most of these in 16 bit.
CUDA_FP32 = frozenset(
    "acos asin binary_cross_entropy_with_logits cosh cosine_embedding_loss cdist cosine_similarity cross_entropy"
    " cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss kl_div l1_loss layer_norm log log10"
    " log_softmax log1p log2 margin_ranking_loss mse_loss multilabel_margin_loss multi_margin_loss nll_loss norm"
    " normalize pdist poisson_nll_loss pow prod reciprocal rsqrt sinh smooth_l1_loss soft_margin_loss softmax softmin"
    " softplus sum renorm tan triplet_margin_loss logsumexp vector_norm __pow__ __rpow__ arccos arcsin".split()
)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EPSILON = 1e-7
VERBS = ("analyze_nan_debug.py", "trainSpeakerNet.py", "SpeakerNet.py")  # these call plug-ins


def call_site(skip: int = 1) -> str:
    """'loss/x.py:31' of the innermost frame in plug-ins or what they import, '' where there is none."""
    frame = sys._getframe(skip)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            place = path.relative_to(ROOT)
            if place.parts[0] in ("models", "loss") or (len(place.parts) == 1 and place.name not in VERBS):
                return f"{place.as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _map(values, change):
    return tuple(change(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)


class CudaCasts(TorchFunctionMode):
    """The casts of CUDA's autocast on a CPU: reductions, roots, powers and losses of 16-bit tensors in fp32."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in CUDA_FP32 and torch.is_autocast_enabled("cpu"):
            args = _map(args, lambda x: x.float() if x.dtype is self.dtype else x)
        return function(*args, **(kwargs or {}))


class Casts(TorchFunctionMode):
    """Casts to any floating type, as plug-ins write them, give one type instead."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") in ("float", "half", "bfloat16", "double"):
            return args[0].to(self.dtype)
        if kwargs.get("dtype") in FLOATING:
            kwargs["dtype"] = self.dtype
        return function(*(self.dtype if _is_dtype(a) else a for a in args), **kwargs)


def _is_dtype(value) -> bool:
    return isinstance(value, torch.dtype) and value in FLOATING


def _away_from_zero(x):
    return torch.where(x < 0, x.clamp(max=-EPSILON), x.clamp(min=EPSILON))


def _positive(x):
    return x.clamp(min=EPSILON)


def _inside_one(x):
    return x.clamp(-1.0 + 1e-6, 1.0 - 1e-6)


def _inside_exp(x):
    return x.clamp(max=10.0 if x.dtype is torch.float16 else 80.0)


def _finite_scores(x):
    return torch.nan_to_num(x, nan=0.0, posinf=1e4, neginf=-1e4)


# Operation -> (which operand, how it is kept where the operation and its slope are finite, the words of the sketch).
GUARDS = {
    **dict.fromkeys(("sqrt", "rsqrt"), (0, _positive, "clamp the operand of {} to at least 1e-7")),
    **dict.fromkeys(("log", "log2", "log10"), (0, _positive, "clamp the operand of {} to at least 1e-7")),
    "log1p": (0, lambda x: x.clamp(min=-1.0 + EPSILON), "clamp the operand of {} to more than -1"),
    **dict.fromkeys(
        ("acos", "arccos", "asin", "arcsin", "atanh", "erfinv"),
        (0, _inside_one, "clamp the operand of {} to within 1 - 1e-6"),
    ),
    **dict.fromkeys(
        ("div", "true_divide", "divide", "__truediv__"),
        (1, _away_from_zero, "keep the divisor at least 1e-7 from zero"),
    ),
    **dict.fromkeys(
        ("__rdiv__", "__rtruediv__", "reciprocal"), (0, _away_from_zero, "keep the divisor at least 1e-7 from zero")
    ),
    **dict.fromkeys(
        ("exp", "expm1", "sinh", "cosh", "exp2"),
        (0, _inside_exp, "bound the operand of {}, or use softplus, logsumexp or log_softmax"),
    ),
    **dict.fromkeys(
        ("softmax", "log_softmax", "logsumexp"), (0, _finite_scores, "mask with a large finite number, not with -inf")
    ),
    **dict.fromkeys(("arctan2", "atan2"), (1, _away_from_zero, "keep the operands of {} away from zero")),
}
NEEDS_ROOT = ("norm", "vector_norm", "dist", "cdist", "pairwise_distance")


class LineGuard(TorchFunctionMode):
    """Guards the operations of one source line; ``applied`` lists what was changed, in words."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.applied = source, []

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if not args or not isinstance(args[0], torch.Tensor) or call_site() != self.source:
            return function(*args, **kwargs)
        if name in ("std", "var", "std_mean", "var_mean"):
            return self.deviation(function, name, args, kwargs)
        if name in ("pow", "__pow__", "float_power") and len(args) > 1 and not isinstance(args[1], torch.Tensor):
            return self.power(function, args, kwargs)
        if name in ("cross_entropy", "nll_loss") and isinstance(kwargs.get("weight"), torch.Tensor):
            self.note("keep the class weights above zero")
            return function(*args, **{**kwargs, "weight": _positive(kwargs["weight"])})
        if name in GUARDS:
            operand, keep, words = GUARDS[name]
            if operand < len(args) and isinstance(args[operand], torch.Tensor) and args[operand].is_floating_point():
                args = (*args[:operand], keep(args[operand]), *args[operand + 1 :])
                self.note(words.format(name.strip("_")))
        elif name == "mean" and args[0].numel() == 0:
            self.note("skip the mean of nothing")
            return torch.nan_to_num(function(*args, **kwargs))
        return function(*args, **kwargs)

    def note(self, words):
        if words not in self.applied:
            self.applied.append(words)

    def power(self, function, args, kwargs):
        exponent = args[1]
        if exponent < 1:
            self.note("clamp the operand of pow to at least 1e-7")
            return function(_positive(args[0]), *args[1:], **kwargs)
        limit = torch.finfo(args[0].dtype).max ** (1.0 / exponent) * 1e-3
        self.note(f"bound the operand of pow (here to {limit:.1g})")
        return function(args[0].clamp(-limit, limit), *args[1:], **kwargs)

    def deviation(self, function, name, args, kwargs):
        """Variance with the biased estimate and a floor: finite for one frame and for constant features."""
        dims = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], bool) else None)
        keep = kwargs.get("keepdim", False)
        x = args[0]
        variance = torch.var(x, dim=dims, correction=0, keepdim=keep) + EPSILON
        self.note(f"use the biased {name} with 1e-7 added to the variance")
        result = variance.sqrt() if name.startswith("std") else variance
        return (result, torch.mean(x, dim=dims, keepdim=keep)) if name.endswith("_mean") else result


class LineBound(TorchFunctionMode):
    """Keeps what the operations of one source line (or of a module's own code) return within finite bounds."""

    def __init__(self, source: str, bound: float = 1e4):
        super().__init__()
        self.source, self.bound = source, bound

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() and call_site() == self.source:
            bounded = torch.nan_to_num(out, nan=0.0, posinf=self.bound, neginf=-self.bound)
            return bounded.clamp(-self.bound, self.bound)
        return out
