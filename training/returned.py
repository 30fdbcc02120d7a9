"""What the forward passes of plug-ins return, held against what docs/extending.md says of them."""

import numbers

import torch

from errors import UsageError
from settings import plugins


def called(module, plugin: str, *arguments):
    """What a plug-in's forward pass returns; UsageError if it takes other arguments than it is called with."""
    try:
        return module(*arguments)
    except TypeError as error:
        if plugins.place(error):
            raise
        raise UsageError(f"{plugins.in_one_line(error, plugin)}; --traceback shows all of it") from error


def checked_embeddings(found, waves: torch.Tensor, network) -> torch.Tensor:
    """The embeddings (B, nOut) that the model of a network returned for waves (B, samples); UsageError for others.

    In training they have a gradient if the model has weights that train.
    """
    rows, size, plugin = len(waves), network.size, f"models/{network.model}.py"
    wanted = isinstance(found, torch.Tensor) and found.shape == (rows, size) and found.is_floating_point()
    if not wanted or (found.dtype == torch.float64 and waves.dtype != torch.float64):
        raise UsageError(
            f"{plugin}: forward must return embeddings (rows, nOut), here ({rows}, {size}), of floating-point numbers; "
            f"it returns {in_words(found)}{_hint(found, rows, size)}"
        )
    cut = network.training and torch.is_grad_enabled() and not found.requires_grad
    if cut and any(parameter.requires_grad for parameter in network.__S__.parameters()):
        raise UsageError(
            f"{plugin}: its embeddings have no gradient, so its weights would not train - .detach(), .data, numpy or "
            "torch.no_grad() cuts it off"
        )
    return found


def _hint(found, rows: int, size: int) -> str:
    """What to change of a model, ' - ..'; '' if that is not known."""
    if found is None:
        return " - is there a 'return'?"
    if isinstance(found, (tuple, list, dict)):
        return " - return the embeddings alone"
    if not isinstance(found, torch.Tensor):
        return ""
    if found.shape == (rows, size):
        return " - end it with .float()" if found.is_floating_point() else ""
    if found.dim() == 2 and len(found) == rows:
        return f" - set nOut: {found.shape[1]}, or let the size of its last layer be nOut"
    if found.dim() > 2 and found.shape[:2] == (rows, size) and found.numel() == rows * size:
        return " - end it with .flatten(1)"
    if found.dim() == 1 and found.numel() == rows * size:
        return " - squeeze() takes the rows away too where there is one: name the dimension"
    return " - pool over time" if found.dim() == 3 and len(found) == rows else ""


def checked_loss(result, plugin: str) -> tuple[torch.Tensor, float | torch.Tensor]:
    """(loss (), accuracy in %, one number) that the loss of the file ``plugin`` returned; UsageError for others."""
    fault = _fault_of(result)
    if fault:
        raise UsageError(f"{plugin}: forward must return (loss, accuracy in %), the loss a single number; {fault}")
    loss, accuracy = result
    return loss.reshape(()) if loss.dim() else loss, _one_number(accuracy)


def _fault_of(result) -> str:
    """What is wrong with what a loss returned; '' if nothing is."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        return f"it returns {in_words(result)}"
    loss, accuracy = result
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return f"it returns {in_words(result)}"
    if torch.is_grad_enabled() and not loss.requires_grad:
        return "it returns a loss without a gradient - .detach(), .item(), .data or torch.no_grad() has cut it off"
    return "" if _one_number(accuracy) is not None else f"it returns {in_words(result)} - the accuracy is one number"


def _one_number(accuracy) -> float | torch.Tensor | None:
    """An accuracy as a number or a tensor of one, also of a list of one as utils.accuracy gives; None if it is none."""
    if isinstance(accuracy, (tuple, list)) and len(accuracy) == 1:
        accuracy = accuracy[0]
    if isinstance(accuracy, torch.Tensor):
        return accuracy.detach().reshape(()) if accuracy.numel() == 1 and not accuracy.is_complex() else None
    if getattr(accuracy, "size", 0) == 1:  # of numpy
        accuracy = accuracy.item()
    return float(accuracy) if isinstance(accuracy, numbers.Real) else None


def in_words(found) -> str:
    """Shapes and kinds of what was returned: '(4, 12), float64', 'a tuple of (4, 12), None'."""
    if isinstance(found, (tuple, list)):
        return ", ".join(map(in_words, found)) or f"an empty {type(found).__name__}"
    if isinstance(found, dict):
        return f"a dict of {', '.join(map(str, found))}"
    if isinstance(found, torch.Tensor):
        kind = "" if found.dtype == torch.float32 else f" {str(found.dtype).removeprefix('torch.')}"
        return f"{tuple(found.shape)}{kind}"
    return "None" if found is None else f"a {type(found).__name__}"
