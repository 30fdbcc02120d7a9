"""Starting from trained weights: the head for other classes, a frozen backbone, and learning rates by part."""

import torch

from config import Config
from corpus.audio import class_count
from errors import UsageError
from settings import plugins
from storage import checkpoint
from training.front_end import plugin_of
from training.precision import BufferSnapshot
from training.schedules import check_optimizer, checked_schedule
from training.slices import cut, whole_shapes

MOST_LISTED = 20  # tensors of a kind that are named before the rest is counted


class FrozenBackbone:
    """Holds the backbone (the model without its loss) as it is for the first ``epochs`` epochs.

    Its parameters get no gradients, so an optimizer passes them by, weight decay included, and its norms use their
    running statistics and leave them as they are. 0 epochs: never. ``norms``: these do so in every epoch.
    """

    def __init__(self, network, epochs: int, norms: bool = False):
        backbone = network.__S__
        self.epochs, self.frozen, self.frozen_norms = epochs, False, norms
        self.parameters = [p for p in backbone.parameters() if p.requires_grad]
        self.norms = [m for m in backbone.modules() if getattr(m, "running_mean", None) is not None]
        if epochs and not any(p.requires_grad for p in getattr(network.loss, "parameters", list)()):
            raise UsageError("freeze_epochs: the loss has no weights of its own, so nothing would train")

    def enter(self, epoch: float) -> bool:
        """Freeze or free the backbone for an epoch of training; returns whether that changed.

        To be called after ``train()``, which puts norms back to the statistics of the batch.
        """
        frozen = epoch <= self.epochs
        for norm in self.norms if frozen or self.frozen_norms else ():
            norm.eval()
        if frozen == self.frozen:
            return False
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)
            parameter.grad = None
        self.frozen = frozen
        return True

    def __str__(self):
        if self.frozen:
            return (
                f"the backbone is frozen to the end of epoch {self.epochs} (freeze_epochs): weights and norm statistics"
            )
        return f"the backbone trains from epoch {self.epochs + 1} on (freeze_epochs)"


def learning_rate_scale(config: Config, processes: int) -> float:
    """Factor of learning rates: rows of a step of all processes over ``lr_reference_batch``, 1 if that is 0.

    The linear rule (Goyal et al. 2017, section 2.1), with accumulated batches counted. wespeaker's reference is 64; it
    multiplies the whole schedule, so ``lr_min`` too.
    """
    rows = processes * config.batch_size * config.gradient_accumulation_steps
    return rows / config.lr_reference_batch if config.lr_reference_batch else 1.0


def scaled(values: dict, scale: float) -> dict:
    """Configuration values for plug-ins, ``lr`` and ``lr_min`` multiplied by ``scale``."""
    return {**values, **{key: scale * values[key] for key in ("lr", "lr_min") if key in values and scale != 1.0}}


def parameter_groups(network, values: dict) -> list:
    """What an optimizer plug-in is given: the trainable parameters, or named groups if a factor is not 1.

    The groups 'backbone' and 'head' have ``lr`` times ``backbone_lr_factor`` and ``head_lr_factor``. The weights of a
    front end have a group of their own, 'frontend', if ``frontend_lr_factor``, which comes to the backbone's, is not 1.
    Schedules that multiply each group's rate, as torch's LambdaLR and StepLR do, keep the ratio.
    """
    factors = group_factors(values)
    if set(factors.values()) == {1.0}:
        return [p for p in network.parameters() if p.requires_grad]
    front = learned_front_end(network) if factors["frontend"] != factors["backbone"] else None
    parts = {"frontend": front, "backbone": network.__S__, "head": network.loss}
    groups, taken = [], set()
    for name, part in parts.items():
        parameters = [p for p in part.parameters() if p.requires_grad and p not in taken] if part is not None else []
        taken.update(parameters)
        if parameters:
            groups.append({"params": parameters, "lr": values["lr"] * factors[name], "name": name})
    return groups


def group_factors(values: dict) -> dict[str, float]:
    """What the learning rate of each group of parameters is multiplied by."""
    backbone = values["backbone_lr_factor"]
    return {
        "frontend": backbone * values["frontend_lr_factor"],
        "backbone": backbone,
        "head": values["head_lr_factor"],
    }


def learned_front_end(network) -> torch.nn.Module | None:
    """The module of frontend/ that a network has if it has weights of its own."""
    plugin = plugin_of(network.__S__)
    return plugin if isinstance(plugin, torch.nn.Module) and any(True for _ in plugin.parameters()) else None


def check_ratio(optimizer, values: dict, scheduler: str):
    """UsageError if a schedule gave all groups one learning rate, so that the factors would be void."""
    factors = group_factors(values)
    for group in optimizer.param_groups:
        factor = factors.get(group.get("name"))
        first = optimizer.param_groups[0]
        if factor is None or not first["lr"]:
            continue
        ratio = factor / factors[first["name"]]
        if abs(group["lr"] / first["lr"] - ratio) > 1e-6 * ratio:
            raise UsageError(
                f"scheduler/{scheduler}.py: does not keep the ratio of backbone_lr_factor, frontend_lr_factor and "
                "head_lr_factor; it must multiply each group's own learning rate"
            )


# ------------------------------------------------------------------------------------------------ initial_model


def load_initial(network, dataset, config: Config, log):
    """Start from the weights of ``initial_model``, if any; what does not fit is listed and starts fresh.

    ``dataset`` knows the speakers. ``log(text)`` prints a line. A file of another toolkit may be a part of the model
    only, a front end: then the rest starts fresh.
    """
    front = learned_front_end(network)
    if config.frontend_lr_factor != 1.0 and not (front and any(p.requires_grad for p in front.parameters())):
        log("frontend_lr_factor: does nothing, for no weights of a front end train")
    if not config.initial_model:
        if getattr(front, "needs_weights", False):
            log(
                f"frontend/{config.frontend}.py begins with random weights: give its published ones as initial_model "
                "(docs/models.md)"
            )
        return
    path = config.initial_model
    state = checkpoint.load(path)
    own = whole_shapes(network)
    weights = checkpoint.weights_of(state, path, own)
    checkpoint.refuse_nonfinite(weights, path, BufferSnapshot(network).nonfinite_by_design)
    weights, note = fit_head(weights, state, own, dataset, config)
    faults = checkpoint.load_weights(network, cut(weights, network), path)
    toolkit = checkpoint.toolkit_of(state, own)
    total, misses = len(own), faults["model"] + faults["loss"]
    refuse_misfit(faults, toolkit, own, config)
    origin = f" ({toolkit.name})" if toolkit else ""
    if toolkit and toolkit.part:
        misses = [line for line in misses if toolkit.needs(line.partition(": ")[0])]
        total = sum(toolkit.needs(name) for name in own)
    log(f"initial_model {path}{origin}: {total - len(misses)} of {total} tensors loaded")
    features = getattr(config, "features", None)
    if toolkit and toolkit.features and features and features not in toolkit.features:
        log(f"  its features are those of {' or '.join(toolkit.features)}, the configuration has features: {features}")
    for line in [note] if note else []:
        log(f"  {line}")
    if note and not any(name.startswith(checkpoint.LOSS) for name in weights):
        misses = faults["model"]  # the note tells of the loss
    unused = faults["unused"]
    if toolkit and toolkit.part:
        log("  it is the front end; the rest of the model and the loss start fresh")
        unused = [name for name in unused if not toolkit.spares(name, own)]
        if len(unused) < len(faults["unused"]):
            log(f"  not used: {len(faults['unused']) - len(unused)} tensors of layers that the model has not")
    for what, lines in (("starts fresh", misses), ("not used", unused)):
        for line in lines[:MOST_LISTED]:
            log(f"  {what}: {line}")
        if len(lines) > MOST_LISTED:
            log(f"  {what}: {len(lines) - MOST_LISTED} more")


def refuse_misfit(faults: dict, toolkit, own: dict, config: Config):
    """UsageError if a file lacks tensors of the model, or of the part that it is of, or has others.

    ``faults``: those that load_weights found. ``own``: the state of the network.
    """
    path, part = config.initial_model, toolkit.part if toolkit else ""
    if part and not any(name.startswith(checkpoint.MODEL + part) for name in own):
        raise UsageError(f"{path}: is a {toolkit.name}; set frontend: ssl and the ssl_model that it is")
    if len(faults["model"] + faults["loss"]) == len(own):
        raise UsageError(f"{path}: none of its tensors fits {config.model}")
    missing, unused = faults["model"], [name for name in faults["unused"] if name.startswith(checkpoint.MODEL)]
    if toolkit:
        missing = [line for line in missing if toolkit.needs(line.partition(": ")[0])]
        unused = [name for name in unused if not toolkit.spares(name, own)]
    if (missing or unused) and not config.allow_partial:
        listing = "; ".join((missing + [f"{name}: not in the model" for name in unused])[:5])
        what = f"frontend/{config.frontend}.py" if part else config.model
        advice = "set the ssl_model that it is, or " if part else ""
        raise UsageError(
            f"{path}: {len(missing)} tensors of {what} are missing or of another shape,"
            f" {len(unused)} of the file are unknown to it: {listing}; {advice}--allow_partial starts the rest fresh"
        )


def fit_head(weights: dict, state: dict, own: dict, dataset, config: Config) -> tuple[dict, str]:
    """Make the head of a checkpoint one for this run's classes; returns (weights, a remark on it).

    ``own``: the state of the network to start.

    Class speaker + speed x speakers is a speaker at a speed, so the head of a run with ``speed_perturb`` begins with
    the speakers as they are: without ``speed_perturb`` it is cut to these. A head of other speakers is left out, one
    of another number of classes does not fit.
    """
    head = {name: tensor for name, tensor in weights.items() if name.startswith(checkpoint.LOSS)}
    own = {name: t for name, t in own.items() if name.startswith(checkpoint.LOSS)}
    speakers = len(dataset.speakers)
    before = state["config"] if isinstance(state.get("config"), dict) else {}
    now = config.nClasses
    if not head or not any(t.dim() > 1 for t in own.values()):
        return weights, ""
    matrices = {name: tensor for name, tensor in head.items() if tensor.dim() > 1}
    rows = {name: max(len(own[name]) // now, 1) for name in matrices if name in own and own[name].dim()}  # of a class
    count = before.get("nClasses") or max((len(t) // rows.get(n, 1) for n, t in matrices.items()), default=0)
    if state.get("speakers", dataset.speakers_hash()) != dataset.speakers_hash():
        rest = {name: tensor for name, tensor in weights.items() if name not in head}
        return rest, f"it was trained with other speakers: the loss starts fresh, {count} classes before, {now} now"
    had_copies = before.get("speed_perturb") and count >= class_count(speakers, True)
    if had_copies and not config.speed_perturb and now == speakers:
        cut = {
            n: t[: len(own[n])] for n, t in head.items() if n in own and t.dim() and _of_classes(t, own[n], count, now)
        }
        if cut:
            text = f"the classifier is cut to the original speakers: the first {now} of {count} classes"
            return {**weights, **cut}, f"{text}, the others were their 0.9x and 1.1x speed copies"
    if count != now:
        return weights, f"the classifier starts fresh: {count} classes before, {now} now"
    return weights, ""


def _of_classes(tensor, own, count: int, now: int) -> bool:
    """Whether a tensor has a row, or several, for each of ``count`` classes if ``own`` has them for ``now``."""
    return tensor.shape[1:] == own.shape[1:] and len(tensor) * now == len(own) * count


def build_optimizer(config: Config, network, steps_per_epoch: int, world: int) -> tuple:
    """Build optimizer, schedule and the schedule's unit ('epoch' or 'iteration') from their plug-ins."""
    values = scaled(config.values(), learning_rate_scale(config, world))
    values["steps_per_epoch"] = steps_per_epoch
    groups = parameter_groups(network, values)
    optimizer = plugins.build("optimizer", config.optimizer, values, groups)
    check_optimizer(optimizer, config.optimizer)
    made = plugins.build("scheduler", config.scheduler, values, optimizer)
    scheduler, unit = checked_schedule(made, config.scheduler, config.max_epoch, steps_per_epoch)
    check_ratio(optimizer, values, config.scheduler)
    return optimizer, scheduler, unit
