"""Numeric precision of training: the autocast type, the loss scale of fp16, and the buffers that a retry puts back."""

import contextlib
import math
import os
import re
from pathlib import Path

import torch

from config import Config
from errors import UsageError
from training.frozen_weights import FrozenWeights

CPU_INFO = Path("/proc/cpuinfo")
# What a processor calls its instructions for a type: x86 (AVX512, AMX), Arm.
INSTRUCTIONS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def choose_amp_dtype(config: Config, device):
    """The autocast type, None for fp32; ``auto`` takes only a type that the device has instructions for."""
    if not config.mixedprec:
        return None
    if config.amp_dtype != "auto":
        return getattr(torch, config.amp_dtype)
    if not is_emulated(torch.bfloat16, device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def is_emulated(dtype, device) -> bool:
    """Whether a device has no instructions for a 16-bit type, so that computing in it is slower than in fp32."""
    if device.type == "cuda":
        return dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False)
    return not INSTRUCTIONS[dtype] & cpu_features()


def cpu_features() -> set[str]:
    """Names of the processor's instruction sets; if Linux does not say them, those that torch knows."""
    if CPU_INFO.is_file():
        lines = re.findall(r"^(?:flags|Features)\s*:(.*)", CPU_INFO.read_text(errors="replace"), re.MULTILINE)
        return set(lines[0].split()) if lines else set()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10
    return {name for name, has in capabilities.items() if has is True}


def emulation_note(config: Config, device) -> str:
    """What to say of a 16-bit type that the device has no instructions for; "" if there is nothing to say."""
    if not config.mixedprec:
        return ""
    if config.amp_dtype == "auto":
        computes_in_fp32 = choose_amp_dtype(config, device) is None
        return (
            "this processor has no bfloat16 instructions, so this run computes in float32" if computes_in_fp32 else ""
        )
    if not is_emulated(getattr(torch, config.amp_dtype), device):
        return ""
    other = "float16" if device.type == "cuda" else "float32"
    price = "" if device.type == "cuda" else ": a step takes up to 16 times as long as in float32"
    return f"this device only emulates {config.amp_dtype}{price}; amp_dtype: auto computes in {other} here"


def choose_kernels(config: Config):
    """Set what a GPU's products compute in, and whether all kernels are to give the same bits in every run.

    Without ``deterministic`` cuDNN tries its kernels on the first batch and takes the fastest one.
    """
    torch.set_float32_matmul_precision(config.float32_matmul)
    cudnn, same = torch.backends.cudnn, config.deterministic
    cudnn.deterministic, cudnn.benchmark = same, not same
    if same:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    if torch.are_deterministic_algorithms_enabled() != same:  # the call alone imports torch's compiler, for a second
        torch.use_deterministic_algorithms(same)


@contextlib.contextmanager
def without_tf32():
    """Context in which a GPU computes in fp32 as it says: TF32, the default of cuDNN, rounds to 10 bits.

    Kernels are not tried either: recordings have too many lengths for that.
    """
    cudnn, chosen = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(cudnn.enabled, False, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)


class LossScaler:
    """Loss scale for fp16 gradients; its state is in torch's GradScaler form.

    Only steps that were taken make the scale grow. A benign overflow is retried at a lower scale by the trainer; a
    fault of the data never lowers it. The scale stays between 2^-10 and 2^24.
    """

    FLOOR, CEILING, GROWTH_INTERVAL = 2.0**-10, 2.0**24, 2000

    def __init__(self, enabled: bool):
        self.enabled, self.scale, self.good_steps = enabled, 2.0**16 if enabled else 1.0, 0

    def retries(self):
        """Lower scales to retry an overflow at."""
        scales = [self.scale / 2**power for power in (1, 2, 4, 8, 16)] if self.enabled else []
        return [s for s in scales if s >= self.FLOOR]

    def lowest(self) -> float:
        """The lowest scale that an overflow is retried at."""
        return min([self.scale, *self.retries()])

    def stepped(self, scale: float):
        """Take note of a step taken at ``scale``."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if scale == self.scale else 1
        self.scale = scale
        if self.good_steps >= self.GROWTH_INTERVAL:
            self.scale, self.good_steps = min(self.scale * 2.0, self.CEILING), 0

    def state_dict(self) -> dict:
        """State under the names of torch's GradScaler; empty if nothing is scaled."""
        if not self.enabled:
            return {}
        state = {"scale": self.scale, "growth_factor": 2.0, "backoff_factor": 0.5}
        return {**state, "growth_interval": self.GROWTH_INTERVAL, "_growth_tracker": self.good_steps}

    def load_state_dict(self, state: dict):
        """Take over a saved state; a scale that is not above 0 is refused."""
        if self.enabled and state:
            if not 0 < state["scale"] < math.inf:
                raise UsageError(f"the checkpoint's loss scale is {state['scale']}; start from another checkpoint")
            self.scale = min(max(float(state["scale"]), self.FLOOR), self.CEILING)
            self.good_steps = int(state["_growth_tracker"])


class BufferSnapshot:
    """A copy of a module's buffers to undo a step with: BatchNorm moves its statistics in the forward pass.

    And of frozen parameters, if a forward pass moves them: a momentum encoder's.

    A forward pass may also put another tensor in the place of a buffer, as ``self.mean = 0.9 * self.mean + ..`` does.
    ``nonfinite_by_design``: names of buffers that are not checked; default those that are not finite now.
    """

    def __init__(self, module, nonfinite_by_design=None):
        self.module = module
        if nonfinite_by_design is None:  # a buffer that holds infinities from the start, as a mask of -inf does
            floating = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
            nonfinite_by_design = {n for n, b in floating.items() if not bool(b.isfinite().all())}
        self.nonfinite_by_design = nonfinite_by_design
        self.frozen = FrozenWeights(module)
        self.find()

    def find(self):
        """Note the buffers that there are, and make room for a copy of them."""
        self.places, by_type = [], {}  # of each buffer: the dict of its module's buffers, its name there, itself
        for module in self.module.modules():
            # Those of torch.jit stay what they are.
            owner = module._buffers if isinstance(module._buffers, dict) else {}
            self.places += [(owner, key, buffer) for key, buffer in owner.items() if buffer is not None]
        for buffer in self.module.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        where = {id(buffer): (owner, key) for owner, key, buffer in self.places}
        named = {n: b for n, b in self.module.named_buffers() if b.is_floating_point()}
        checked = {n: b for n, b in named.items() if n not in self.nonfinite_by_design}
        self.names = list(checked)
        self.checked = [where.get(id(buffer), ({"": buffer}, "")) for buffer in checked.values()]
        self.groups = [(buffers, [b.detach().clone() for b in buffers]) for buffers in by_type.values()]

    @property
    def floating(self) -> list[torch.Tensor]:
        """The buffers that are checked, as they are now."""
        return [owner[key] for owner, key in self.checked]

    def first_bad(self) -> str:
        """Name the first buffer that is not finite, else the largest, whose square overflows; '' without buffers."""
        sizes = [float(b.abs().max().nan_to_num(math.nan, math.inf)) if b.numel() else 0.0 for b in self.floating]
        bad = next((n for n, size in zip(self.names, sizes) if not math.isfinite(size)), "")
        if bad or not sizes:
            return bad and f"'{bad}' became non-finite"
        largest = max(sizes)
        return f"'{self.names[sizes.index(largest)]}' became so large ({largest:.2g}) that its square overflows"

    @torch.no_grad()
    def take(self):
        """Copy the buffers."""
        self.frozen.take()
        if any(owner.get(key) is not buffer for owner, key, buffer in self.places):
            self.find()
            return
        for buffers, copies in self.groups:
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def restore(self):
        """Put the copy back, and each buffer where it was."""
        self.frozen.restore()
        for buffers, copies in self.groups:
            torch._foreach_copy_([buffer.detach() for buffer in buffers], copies)
        for owner, key, buffer in self.places:
            owner[key] = buffer
