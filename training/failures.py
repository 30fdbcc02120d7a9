"""What a step says that an exception ends where no line of a plug-in raised it: the backward pass, or the update."""

import re
import traceback

from config import Config
from errors import UsageError, first_line
from settings import plugins
from training.meeting import LOST

# What to do about it, by what torch says of a backward pass.
OF_BACKWARD = {
    r"backward through the graph a second time": "something of an earlier step is used again: .detach() what is kept "
    "from step to step",
    r"modified by an inplace operation": "a tensor that gradients need is changed in place: x = x + y for x += y, "
    "relu(x) for relu_(x)",
}


def raise_explained(error: Exception, config: Config):
    """Raise a UsageError of one line for an exception of a step; nothing if it is another's to explain."""
    told = explained(error, config)
    if told is not None:
        raise told from error


def explained(error: Exception, config: Config) -> UsageError | None:
    """One line on an exception of a step that came through no plug-in; None if it is another's to explain."""
    if isinstance(error, UsageError) or plugins.of_device(error) or plugins.place(error):
        return None
    frames = [
        (frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    said = f"{type(error).__name__}: {first_line(error).split('. ')[0]}"
    if any(file.endswith("training/step.py") and name == "apply" for file, name in frames):
        hint = " - set fused: false" if "fused=True" in said else ""
        return UsageError(f"optimizer/{config.optimizer}.py: its step fails: {said}{hint}; --traceback shows all of it")
    advice = next((text for words, text in OF_BACKWARD.items() if re.search(words, str(error))), "")
    through = any("torch/autograd/" in file and name == "backward" for file, name in frames)
    if not advice and (not through or LOST.search(str(error))):
        return None
    front = [f"frontend/{config.frontend}.py"] if config.frontend else []
    files = " or ".join([*front, f"models/{config.model}.py", f"loss/{config.trainfunc}.py"])
    return UsageError(
        f"{files}: the backward pass fails: {said}{f' - {advice}' if advice else ''}; --traceback shows all of it"
    )
