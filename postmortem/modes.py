"""Function modes that change how chosen operations compute during a replay, and nothing outside it."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from postmortem.places import call_site

# What CUDA's autocast computes in fp32 (PyTorch documentation, "CUDA Ops that can autocast to float32"); the CPU's
# autocast leaves most of these in 16 bit.
CUDA_FP32 = frozenset(
    "acos asin binary_cross_entropy_with_logits cosh cosine_embedding_loss cdist cosine_similarity cross_entropy"
    " cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss kl_div l1_loss layer_norm log log10"
    " log_softmax log1p log2 margin_ranking_loss mse_loss multilabel_margin_loss multi_margin_loss nll_loss norm"
    " normalize pdist poisson_nll_loss pow prod reciprocal rsqrt sinh smooth_l1_loss soft_margin_loss softmax softmin"
    " softplus sum renorm tan triplet_margin_loss logsumexp vector_norm __pow__ __rpow__ arccos arcsin".split()
)
# Operations of whole numbers whose result may lie outside of its type, where it wraps around without a word.
WRAPPING = frozenset("mul add sub pow neg abs mm bmm dot _to_copy".split())
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


class WholeNumbers(TorchDispatchMode):
    """Whole numbers that do not wrap around: what leaves the range of its type is computed in float64 instead.

    ``found`` holds (operation, source line, type) of each.
    """

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, str, str]] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if not is_whole(name, out):
            return out
        if name == "_to_copy":
            wide = args[0].double().trunc()
        else:
            wide = function(*(a.double() if isinstance(a, torch.Tensor) else a for a in args), **(kwargs or {}))
        if bool((out.double() == wide).all()) or not bool(wide.isfinite().all()):
            return out
        self.found.append((name, call_site(2), str(out.dtype).removeprefix("torch.")))
        return wide


def is_whole(name: str, out) -> bool:
    """Whether a result is of whole numbers that an operation may have wrapped around."""
    if name not in WRAPPING or not isinstance(out, torch.Tensor) or out.dtype is torch.bool:
        return False
    return not (out.is_floating_point() or out.is_complex())
