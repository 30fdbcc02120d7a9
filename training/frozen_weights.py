"""Parameters that no gradient reaches, but a forward pass may write: a momentum encoder's, a centre's."""

import torch
from torch import nn

from training.slices import local


class FrozenWeights:
    """Copies those that a forward pass writes, to undo a step with; all others cost no memory after the first step.

    What is written is found in the first step, by comparing all of them with a copy on the CPU: MoCo's
    ``key.data = key.data * m + query.data * (1 - m)`` leaves no other trace. Later writes are seen by torch's counter.
    """

    def __init__(self, module: nn.Module):
        self.parameters = [p for p in module.parameters() if not p.requires_grad]
        self.first: list[torch.Tensor] | None = None  # copies as before the first step
        self.copies: dict[int, torch.Tensor] = {}  # of those that are written, by number
        self.versions: list[int] = []

    @property
    def kept(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """(parameter, its copy) of those that are written."""
        return [(self.parameters[number], copy) for number, copy in self.copies.items()]

    def find(self):
        """Look for parameters that were written since ``take``, and copy them from now on."""
        for number, parameter in enumerate(self.parameters):
            if number in self.copies or parameter.requires_grad:  # one that trains again is the optimizer's
                continue
            now = local(parameter.detach())
            if self.first is not None:
                before = self.first[number].to(now.device)
                if not bool(((now == before) | ((now != now) & (before != before))).all()):
                    self.copies[number] = before
            elif parameter._version != self.versions[number]:
                self.copies[number] = now.clone()
        self.first = None

    @torch.no_grad()
    def take(self):
        """Copy those that are written, before a step."""
        if self.versions:
            self.find()
        elif self.parameters:
            self.first = [local(p.detach()).to("cpu", copy=True) for p in self.parameters]
        for parameter, copy in self.kept:
            copy.copy_(local(parameter.detach()))
        self.versions = [p._version for p in self.parameters]

    @torch.no_grad()
    def restore(self):
        """Put the copies back."""
        if self.first is not None:
            self.find()
        for parameter, copy in self.kept:
            local(parameter.detach()).copy_(copy)
