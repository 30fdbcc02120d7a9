"""The optimizer's step, looked at before it counts: one that makes something non-finite is taken back bit for bit."""

import torch

from storage.dump import tensor_stats
from training.slices import local
from utils import total_norm

HEADROOM = 0.95  # share of a GPU's memory that the highest point of a step and the copy may take together
LOST = "an update that makes something non-finite cannot be taken back, and ends the run"


class UpdateGuard:
    """Keeps what an optimizer's step may change as it was before the step.

    That is every tensor, number, list and dict that the optimizer holds or reaches: parameters, moments, counters,
    settings, and the same of an optimizer inside it. Objects of other kinds, as a generator of its own, are not kept.
    If the memory of one process does not allow a copy ``keeps`` is False on all: then a bad step is seen but cannot be
    taken back. ``otherwise`` is what is said of that.
    """

    def __init__(self, optimizer, network, log, ranks, otherwise: str = LOST):
        self.optimizer, self.log, self.ranks, self.otherwise, self.keeps = optimizer, log, ranks, otherwise, True
        names = {id(p): name for name, p in network.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.parameters = [(names.get(id(p), f"parameter {i}"), p) for i, p in enumerate(parameters)]
        self.containers, self.tensors, self.copies = {}, [], []
        self.held: dict[torch.device, int] = {}  # bytes of the newest copy, while the steps before were taken
        self.highest: dict[torch.device, int] = {}  # bytes of a GPU that steps have taken, as far as they are over
        self.released = False

    def sizes(self) -> dict[torch.device, int]:
        """Bytes of what is copied, by the device that it is on."""
        found: dict[torch.device, int] = {}
        for tensor in map(local, self.tensors):
            found[tensor.device] = found.get(tensor.device, 0) + tensor.nbytes
        return found

    def find(self) -> list[torch.Tensor]:
        """Note the lists and dicts that the optimizer holds, with their content; returns the tensors."""
        self.containers, found = {}, {}
        collect(vars(self.optimizer), self.containers, found)
        return list(found.values())

    @torch.no_grad()
    def take(self):
        """Copy everything that the optimizer holds."""
        if not self.keeps:
            return
        tensors = self.find()
        if len(tensors) != len(self.tensors) or any(a is not b for a, b in zip(tensors, self.tensors)):
            self.tensors = tensors
            self.reserve()
        for tensors, copies in self.copies:
            torch._foreach_copy_(copies, tensors)

    @torch.no_grad()
    def take_settings(self):
        """Copy the settings again, and all numbers and lists, as a schedule that moved on has left them."""
        if not self.keeps:
            return
        self.find()
        values = [v for group in self.optimizer.param_groups for k, v in group.items() if k != "params"]
        settings = {id(v) for v in values if isinstance(v, torch.Tensor)}
        for tensors, copies in self.copies if settings else ():
            for tensor, kept in zip(tensors, copies):
                if id(tensor) in settings:
                    kept.copy_(tensor)

    def reserve(self):
        """Make room for a copy of the tensors; if a process has none, say so once and keep nothing from now on."""
        self.copies, by_kind = [], {}
        for tensor in map(local, self.tensors):
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        sizes, fits = self.sizes(), self.fits()
        for device in self.on_gpus() if self.released else ():
            torch.cuda.reset_peak_memory_stats(device)
        self.released = False
        try:
            if fits:
                self.copies = [(same, [torch.empty_like(t) for t in same]) for same in by_kind.values()]
        except RuntimeError as error:  # torch's out of memory, of a GPU or of the machine
            if "memory" not in str(error):
                raise
            fits = False
        if not self.ranks.any(not fits):  # processes that undo a step and others that cannot would wait for each other
            self.held = sizes
            return
        self.release()
        self.keeps = False
        size = f"{sum(sizes.values()) / 1e6:.0f} MB"
        self.log(f"no memory for a copy of weights and moments ({size}): {self.otherwise}")

    def fits(self) -> bool:
        """Whether a GPU has room for the copy beside the highest point of the steps before, without their copy."""
        for device, size in self.sizes().items():
            if device.type != "cuda":
                continue
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            highest = 0 if self.released else torch.cuda.max_memory_allocated(device)
            others = max(highest, self.highest.get(device, 0)) - self.held.get(device, 0)
            if others + size > HEADROOM * free:
                return False
        return True

    def release(self):
        """Give the memory of the copy back until the next step; what an evaluation takes until then is no step's."""
        self.containers, self.tensors, self.copies = {}, [], []
        if not self.released:
            for device in self.on_gpus():
                self.highest[device] = max(self.highest.get(device, 0), torch.cuda.max_memory_allocated(device))
        self.released = True

    def on_gpus(self) -> list[torch.device]:
        """The GPUs on which a copy has been."""
        return [device for device in self.held if device.type == "cuda"]

    @torch.no_grad()
    def undo(self) -> bool:
        """Put everything back; returns False if there is no copy."""
        if not self.keeps:
            return False
        for container, content in self.containers.values():
            if isinstance(container, dict):
                container.clear()
                container.update(content)
            else:
                container[:] = content
        for tensors, copies in self.copies:
            torch._foreach_copy_(tensors, copies)
        return True

    def watched(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name; those of an optimizer that keeps them elsewhere are its weights only.

        Of split ones this process's rows.
        """
        found = {name: local(p.detach()) for name, p in self.parameters}
        state = getattr(self.optimizer, "state", {})
        for index, (_, parameter) in enumerate(self.parameters):
            for key, value in state.get(parameter, {}).items():
                moment = isinstance(value, torch.Tensor) and value.is_floating_point()
                if moment and value.shape == parameter.shape and value.device == parameter.device:
                    found[f"optimizer.{index}.{key}"] = local(value)
        return found

    def suspicious(self, refused: str, watched: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Whether something of ``watched`` may be non-finite now, as a flag on the device, which is not asked.

        ``refused``: why the optimizer refused its numbers, and so has stopped half-way; '' if it did not.
        """
        flag = ~total_norm(list((watched or self.watched()).values())).isfinite()
        return torch.ones_like(flag) if refused else flag

    def spoiled(self, refused: str = "") -> tuple[dict, str]:
        """What a step made non-finite, {name: statistics} of the first rank that has any, and why one refused it.

        Both are empty if all is well everywhere: then the device is read once. A finite value whose square overflows is
        not counted.
        """
        watched = self.watched()
        if not self.ranks.maximum(self.suspicious(refused, watched).float()).item():
            return {}, ""
        bad = {n: t for n, t in watched.items() if not bool(t.isfinite().all())}
        found, refusals = zip(*self.ranks.gather((tensor_stats(bad), refused)))
        return next(filter(None, found), {}), next(filter(None, refusals), "")


def collect(value, containers: dict, tensors: dict):
    """Gather the lists and dicts below a value {id: (container, content)}, and the tensors in them {id: tensor}."""
    if isinstance(value, torch.Tensor):
        tensors[id(value)] = value
    elif hasattr(value, "param_groups"):  # an optimizer in an optimizer
        collect(vars(value), containers, tensors)
    elif isinstance(value, tuple):
        for item in value:
            collect(item, containers, tensors)
    elif isinstance(value, (dict, list)) and id(value) not in containers:
        content = dict(value) if isinstance(value, dict) else list(value)
        containers[id(value)] = (value, content)
        for item in content.values() if isinstance(content, dict) else content:
            collect(item, containers, tensors)
