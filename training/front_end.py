"""The front end that the key ``frontend`` chooses: made, tried on noise, and handed to the model."""

import torch

from errors import UsageError
from frontend.chains import Chain
from settings import plugins

SECONDS = 0.5  # of noise that it is tried on


def with_front_end(values: dict) -> dict:
    """Configuration values as a model is built with them: ``frontend`` is the module of frontend/ in place of its name.

    Without the key, or for a model that computes features of its own, there is no ``frontend`` among them. UsageError
    if the file gives no features (B, n_mels, frames), or NaN for noise.
    """
    name = values.get("frontend", "")
    values = {key: value for key, value in values.items() if key != "frontend"}
    if not name or "frontend" not in plugins.known_declaration("models", values["model"]).keys:
        return values
    module = plugins.build("frontend", name, values)
    plugin = f"frontend/{name}.py"
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{plugin}: FrontEnd makes no torch.nn.Module")
    with plugins.explained(plugin):
        found = _of_noise(module, round(SECONDS * values["sample_rate"]) if "sample_rate" in values else 8000)
    wanted, given = (2, values["n_mels"]), tuple(getattr(found, "shape", ()))
    if len(given) != 3 or given[:2] != wanted or not given[2]:
        shown = given if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise UsageError(f"{plugin}: must give (2, n_mels {wanted[1]}, frames) of 2 waveforms, it gives {shown}")
    if found.dtype != torch.float32 or not found.isfinite().all():
        what = "NaN or Inf" if found.dtype == torch.float32 else str(found.dtype).removeprefix("torch.")
        raise UsageError(f"{plugin}: gives {what} for noise, and must give finite float32")
    return {**values, "frontend": module}


def plugin_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module of frontend/ that a model computes its features with; None if they are its own."""
    return getattr(getattr(model, "frontend", None), "plugin", None)


def empty_bands(network: torch.nn.Module) -> str:
    """What to say of mel filters so narrow that no frequency of the spectrum lies in them; '' if there are none."""
    for chain in network.modules():
        if isinstance(chain, Chain) and hasattr(chain, "banks"):  # a plug-in computes its own
            empty = int((chain.banks.sum(dim=0) == 0).sum())
            if empty:
                return (
                    f"n_mels: {empty} of {chain.banks.shape[1]} filters of the features '{chain.features}' lie between "
                    f"two frequencies of the spectrum at {chain.sample_rate} Hz and stay constant: set a lower n_mels"
                )
    return ""


def _of_noise(module, samples: int):
    """What a front end gives of two waveforms of noise; the generators and the module are as before."""
    was, generator = module.training, torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(2, samples, generator=generator)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return module.eval()(noise)
        finally:
            module.train(was)
