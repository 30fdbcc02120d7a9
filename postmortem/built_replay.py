"""Replays dumps of loops that are not the trainer's, through the function that builds their network."""

import torch

from errors import UsageError
from postmortem.built import Builder, changed_files, folder_of
from postmortem.replay import Replay, ReplayError


class BuiltReplay(Replay):
    """The step of a dump of NumericGuard. Its ``settings`` are options of the optimizer and ``grad_clip``."""

    files = "source files"

    def changed_sources(self) -> list[str]:
        """The source files of the user that are not those of the loop; ReplayError if the module is not here."""
        try:
            self.folder = folder_of(self.dump)
        except UsageError as error:
            raise ReplayError(f"not replayed: {error}") from error
        return changed_files(self.dump, self.folder)

    def batch(self) -> torch.Tensor:
        """The batch (1, B, values); whole numbers as float64, which holds them exactly and can be averaged."""
        data = self.dump["data"]
        if not data.numel():
            raise ReplayError("not replayed: the batch is empty")
        return (data if data.is_floating_point() else data.double()).unsqueeze(0)

    @property
    def settings(self) -> set[str]:
        """Keys that ``run`` may be given as settings."""
        groups = self.state["optimizer_state_dict"]["param_groups"]
        return {"grad_clip", *(key for group in groups for key in group if key != "params")}

    def new_network(self, settings: dict | None = None):
        """Build the network with fresh weights; ``settings`` are none of its own."""
        try:
            network, optimizer = Builder(self.dump["build"], self.folder).make()
        except UsageError as error:
            raise ReplayError(f"not replayed: {error}") from error
        network.optimizer = optimizer
        return network

    def step(self, settings: dict | None = None):
        """The trainer's step on the network with the dump's state in it."""
        self.check_settings(settings or {})
        return super().step(None)

    def check_settings(self, settings: dict):
        """Raise ReplayError for a key that is none of ``settings``."""
        unknown = settings.keys() - self.settings
        if unknown:
            raise ReplayError(f"'{min(unknown)}' is no setting of this loop")

    def fits(self, settings: dict) -> bool:
        """No setting changes the network."""
        return False

    def prepare(self, network):
        """Put modules into training or evaluation mode, and freeze parameters, as in the loop."""
        evaluating, frozen = set(self.dump.get("evaluating", ())), set(self.dump.get("frozen", ()))
        for name, module in network.named_modules():
            module.training = name not in evaluating
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name not in frozen)

    def new_optimizer(self, network, settings: dict | None = None, saved: dict | None = None):
        """The optimizer that was built with a network; ``settings`` are options of its groups."""
        chosen = {key: value for key, value in (settings or {}).items() if key != "steps_per_epoch"}
        self.check_settings(chosen)
        for group in network.optimizer.param_groups:
            group.update({key: value for key, value in chosen.items() if key in group})
        return network.optimizer

    def window(self, data, label, columns, dtype: torch.dtype = torch.float32) -> list[dict]:
        """The batch of the step in the shape and type that the loop had; in float64 if that is tried."""
        kind = self.dump["data"].dtype
        rows = slice(None) if columns is None else torch.as_tensor(columns)
        data, label = data[0][rows], label[rows]
        if kind.is_floating_point and dtype is torch.float64:
            kind = dtype
            label = label.double() if label.is_floating_point() else label
        return [{"data": data.reshape(len(data), *self.dump["row_shape"]).to(kind), "label": label}]
