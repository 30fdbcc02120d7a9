"""Numerical hazards that can be read off the configuration and the source of the plug-ins, before anything runs."""

import ast
from pathlib import Path

from config import Config
from preflight.hazards import hazards
from settings import plugins
from settings.reader import Setting, key_text

FP16_MAX, FP16_MIN, FP32_MAX = 65504.0, 2.0**-24, 3.4028e38
ABSURD_LR = {"adam": 0.05, "adamw": 0.05, "sgd": 2.0}  # above it a warning, above 1,000 times it an error

# ------------------------------------------------------------------------------------------------- configuration


def check_keys(config: Config, written: dict, report):
    """Report values that make numbers overflow, diverge or vanish. What the table of keys refuses is not repeated."""
    report.heading("configuration")
    before = dict(report.counts)

    def say(level, key, why):
        value = getattr(config, key)
        place = key_text(written.get(key, Setting(value, "default")), key)
        report.finding(level, f"{place}: {value:g} - {why}" if type(value) is float else f"{place}: {value} - {why}")

    import torch

    from training.precision import choose_amp_dtype, emulation_note

    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    fp16 = choose_amp_dtype(config, device) is torch.float16
    emulation = emulation_note(config, device)
    if emulation:
        say("note" if config.amp_dtype == "auto" else "warning", "mixedprec", emulation)
    check_optimizer(config, fp16, say)
    check_loss(config, fp16, say)
    check_schedule(config, say)
    if fp16 and not config.grad_clip:
        say("warning", "grad_clip", "off with float16: one steep batch moves the weights as far as it likes")
    if config.nan_inject:
        say("warning", "nan_inject", "a rehearsal: these steps are spoiled on purpose")
    if before == report.counts:
        report.line("  no hazard found")


def _taken_by(config: Config, folder: str) -> dict:
    return plugins.known_declaration(folder, getattr(config, plugins.CHOSEN_BY[folder])).keys


def check_optimizer(config: Config, fp16: bool, say):
    """Check learning rate, weight decay, momentum and eps."""
    name, taken = config.optimizer, _taken_by(config, "optimizer")
    absurd = ABSURD_LR.get(name, 10.0)
    if config.lr > absurd:
        level = "error" if config.lr > 1000 * absurd else "warning"
        say(level, "lr", f"very high for {name}; above {absurd:g} training seldom holds")
    momentum = getattr(config, "momentum", 0.0) if "momentum" in taken else 0.0
    if momentum >= 1:
        say("error", "momentum", "at 1 or above the past never fades: the weights grow without end")
    # With decay alone a weight is multiplied by 1 - lr wd; Nesterov's look-ahead makes that diverge earlier.
    product, limit = config.lr * config.weight_decay, 2.0
    if getattr(config, "nesterov", False) and 0 < momentum < 1:
        limit = 2 * (1 + momentum) / (1 + 2 * momentum)
    if product > limit:
        say("error", "weight_decay", f"times lr is {product:g}: above {limit:.3g} the weights grow at every step")
    elif product >= 1:
        say("warning", "weight_decay", f"times lr is {product:g}: from 1 on a step throws all weights away")
    if "eps" in taken and config.eps <= 0:
        say("error", "eps", f"{name} divides by the root of a mean that is 0 where a gradient is exactly 0")
    for folder in ("optimizer", "models", "loss"):
        for key, default in _taken_by(config, folder).items():
            value = getattr(config, key, None)
            # The optimizer's own default of 1e-8 is safe: its state is fp32 here.
            if fp16 and "eps" in key and type(value) is float and 0 < value < FP16_MIN and value != default:
                say("warning", key, f"rounds to 0 in float16, whose smallest number is {FP16_MIN:.1e}")


def check_loss(config: Config, fp16: bool, say):
    """Check margin and scale, if the loss takes them."""
    taken = _taken_by(config, "loss")
    if "scale" in taken:
        if config.scale > FP32_MAX:
            say("error", "scale", "overflows float32: the loss is not finite")
        elif fp16 and config.scale > FP16_MAX:
            say("error", "scale", f"float16 ends at {FP16_MAX:g}")
        elif config.scale > 1000:
            say("warning", "scale", "very high: 15 to 64 is usual, and the softmax becomes a hard maximum")
        declared = plugins.known_declaration("loss", config.trainfunc).constants
        # Without a range of its own: a loss that was dropped in. Of a pair loss the margin is a distance.
        if "margin" in taken and "margin_range" not in declared and not 0 <= config.margin < 1.57:
            say("warning", "margin", "outside [0, 1.57): the target logit no longer falls with the angle")
    if "margin_warmup" in taken and config.margin_warmup[0] < config.margin_warmup[1] > config.max_epoch + 1:
        say("warning", "margin_warmup", f"max_epoch is {config.max_epoch}: the margin never reaches {config.margin:g}")


def check_schedule(config: Config, say):
    """Check the lengths of the learning-rate schedule against ``max_epoch``."""
    taken = _taken_by(config, "scheduler")
    if "lr_min" in taken and config.lr_min >= config.lr:
        say("warning", "lr_min", f"not below lr ({config.lr:g}): the learning rate does not fall")
    if "warmup_epochs" in taken and config.warmup_epochs >= config.max_epoch:
        say("warning", "warmup_epochs", f"max_epoch is {config.max_epoch}: the learning rate never reaches lr")
    if "warmup_share" in taken and not 0 < config.warmup_share < 1:
        say("warning", "warmup_share", "outside (0, 1): the learning rate only rises, or begins at its peak")
    if "cycle_epochs" in taken and config.cycle_epochs > 2 * config.max_epoch:
        say("warning", "cycle_epochs", f"max_epoch is {config.max_epoch}: the learning rate never reaches its peak")


# ------------------------------------------------------------------------------------------------ plug-in sources


def plugin_files(config: Config) -> list[Path]:
    """The files of the chosen plug-ins, and those of models/, frontend/ and loss/ that they import, in that order."""
    files = []

    def visit(path):
        if path in files or not path.is_file():
            return
        files.append(path)
        for node in ast.walk(plugins.parse(path)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            for module in modules:
                parts = module.split(".")
                if parts[0] in ("models", "frontend", "loss") and len(parts) == 2:
                    visit(plugins.ROOT / parts[0] / f"{parts[1]}.py")

    for folder, key in plugins.CHOSEN_BY.items():
        if getattr(config, key):
            visit(plugins.ROOT / folder / f"{getattr(config, key)}.py")
    return files


def check_plugins(config: Config, report):
    """Note the unguarded operations in the plug-ins' sources: where, what, why, and what to write instead."""
    report.heading("source of the plug-ins")
    files = plugin_files(config)
    rows = [
        (f"{path.relative_to(plugins.ROOT)}:{found.line}", shortened(found.code), found.why, f"write {found.instead}")
        for path in files
        for found in hazards(plugins.parse(path))
    ]
    names = ", ".join(str(path.relative_to(plugins.ROOT)) for path in files)
    if rows:
        report.finding("note", "not guarded by a clamp or a small number added, as far as can be seen:", rows)
    else:
        report.line(f"  no unguarded root, logarithm, power, exponential, division or mask in {names}")


def shortened(code: str) -> str:
    """Code in one line of at most 60 characters."""
    line = " ".join(code.split())
    return line if len(line) <= 60 else line[:57] + "..."
