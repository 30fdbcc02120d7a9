"""Function modes that change how chosen operations compute during a replay, and nothing outside it."""

import functools
import math
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from errors import ROOT

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


@functools.cache
def _place(filename: str) -> str:
    """'loss/x.py' of a file that belongs to plug-ins or to what they import, '' of any other."""
    path = Path(filename)
    if not path.is_relative_to(ROOT):
        return ""
    place = path.relative_to(ROOT)
    plug_in = place.parts[0] in ("models", "loss", "optimizer", "scheduler")
    return place.as_posix() if plug_in or (len(place.parts) == 1 and place.name not in VERBS) else ""


def call_site(skip: int = 1) -> str:
    """'loss/x.py:31' of the innermost frame in plug-ins or what they import, '' if there is none."""
    frame = sys._getframe(skip)
    while frame is not None:
        place = _place(frame.f_code.co_filename)
        if place:
            return f"{place}:{frame.f_lineno}"
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
    return torch.where(x == -torch.inf, torch.full_like(x, -1e4), x)


# Operation -> (which operand, a change after which the operation and its slope are finite, the change in words).
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
    **dict.fromkeys(("arctan2", "atan2", "hypot"), (1, _away_from_zero, "keep the operands of {} away from zero")),
    "acosh": (0, lambda x: x.clamp(min=1.0 + 1e-6), "clamp the operand of {} to more than 1"),
}


class LineGuard(TorchFunctionMode):
    """Guards the operations of one source line; ``applied`` lists what was changed, in words."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.applied = source, []

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if not args or not isinstance(args[0], torch.Tensor) or call_site() != self.source:
            return function(*args, **kwargs)
        infinite = [a for a in args if isinstance(a, float) and not math.isfinite(a)]
        if infinite:  # softmax and max accept it; multiplied, or if all are masked, it becomes NaN
            args = tuple(math.copysign(1e4, a) if isinstance(a, float) and a in infinite else a for a in args)
            self.noted(args, f"write a large finite number in the place of {infinite[0]}")
        if name in ("std", "var", "std_mean", "var_mean"):
            return self.deviation(name, args, kwargs)
        if name in ("pow", "__pow__", "__rpow__", "float_power") and len(args) > 1:
            args = self.power(name, args)
        elif name in ("cross_entropy", "nll_loss") and len(args) > 1 and _all_ignored(args[1], kwargs):
            return self.noted(args[0].sum() * 0.0, "skip the loss where every label is ignored")
        elif name in ("cross_entropy", "nll_loss") and isinstance(kwargs.get("weight"), torch.Tensor):
            kwargs["weight"] = self.noted(_positive(kwargs["weight"]), "keep the class weights above zero")
        elif name in ("cosine_similarity", "normalize", "layer_norm", "batch_norm", "group_norm", "rms_norm"):
            if kwargs.get("eps", 1.0) < 1e-6:
                kwargs["eps"] = self.noted(1e-6, f"give {name} an eps of 1e-6")
        elif name == "mean" and args[0].numel() == 0:
            return torch.nan_to_num(self.noted(function(*args, **kwargs), "skip the mean of nothing"))
        elif name in GUARDS:
            args = self.guarded(name, args)
        return function(*args, **kwargs)

    def guarded(self, name, args):
        """Return the operands, the singular one (a tensor or a plain number) moved away from its singularity."""
        operand, keep, words = GUARDS[name]
        value = args[operand] if operand < len(args) else None
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = self.noted(keep(value), words.format(name.strip("_")), value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < EPSILON:
            value = self.noted(EPSILON, words.format(name.strip("_")))
        return (*args[:operand], value, *args[operand + 1 :])

    def noted(self, value, words, before=None):
        """Return ``value``; record the change in words, unless ``value`` equals ``before``."""
        if words not in self.applied and not (before is not None and torch.equal(value, before)):
            self.applied.append(words)
        return value

    def power(self, name, args):
        """Return the operands of a power, its base bounded for a whole exponent above 0, else above zero."""
        base, exponent = (args[1], args[0]) if name == "__rpow__" else args[:2]
        if isinstance(base, torch.Tensor) and base.is_floating_point():
            if isinstance(exponent, torch.Tensor) or exponent < 1 or exponent != int(exponent):
                base = self.noted(_positive(base), "clamp the base of the power to at least 1e-7", base)
            else:
                limit = torch.finfo(base.dtype).max ** (1.0 / exponent) * 1e-3
                base = self.noted(base.clamp(-limit, limit), f"bound the base of the power (here to {limit:.1g})", base)
        return (exponent, base, *args[2:]) if name == "__rpow__" else (base, *args[1:])

    def deviation(self, name, args, kwargs):
        """Return the biased variance plus a floor: finite for one frame and for constant features."""
        dims = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], bool) else None)
        keep = kwargs.get("keepdim", False)
        x = args[0]
        variance = torch.var(x, dim=dims, correction=0, keepdim=keep) + EPSILON
        variance = self.noted(variance, f"use the biased {name} with 1e-7 added to the variance")
        result = variance.sqrt() if name.startswith("std") else variance
        return (result, torch.mean(x, dim=dims, keepdim=keep)) if name.endswith("_mean") else result


def _all_ignored(label, kwargs) -> bool:
    return isinstance(label, torch.Tensor) and bool((label == kwargs.get("ignore_index", -100)).all())


class _FiniteGradient(torch.autograd.Function):
    """Identity whose gradient is bounded, with 0 in place of NaN and Inf."""

    @staticmethod
    def forward(ctx, x, bound):
        ctx.bound = bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0).clamp(-ctx.bound, ctx.bound), None


class LineBound(TorchFunctionMode):
    """Keeps what the operations of one source line return, and the gradients that leave it, within finite bounds.

    This shows what a mask of the elements for which an operation is not defined would do. ``share`` is the largest
    share of an operation's result that was not finite.
    """

    def __init__(self, source: str, bound: float = 1e4):
        super().__init__()
        self.source, self.bound, self.share = source, bound, 0.0

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if call_site() != self.source:
            return function(*args, **(kwargs or {}))
        args = tuple(_FiniteGradient.apply(a, self.bound) if _learns(a) else a for a in args)
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() and not _in_place(function):
            self.share = max(self.share, float((~out.detach().isfinite()).float().mean()))
            bounded = torch.nan_to_num(out, nan=0.0, posinf=self.bound, neginf=-self.bound)
            return bounded.clamp(-self.bound, self.bound)
        return out


def _learns(value) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_floating_point() and not value.is_leaf


def _in_place(function) -> bool:
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__")
