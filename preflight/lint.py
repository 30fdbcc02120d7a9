"""Numerical hazards that can be read off the configuration and the source of the plug-ins, before anything runs."""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

from config import Config
from settings import plugins
from settings.reader import Setting, key_text

FP16_MAX, FP16_MIN, FP32_MAX = 65504.0, 2.0**-24, 3.4028e38
ABSURD_LR = {"adam": 0.05, "adamw": 0.05, "sgd": 2.0}  # a good engineer would ask; beyond 1,000 times that nobody would

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

ROOTS = {"sqrt": "the slope of a root at 0 is infinite", "rsqrt": "1/sqrt(0) is Inf"}
LOGS = dict.fromkeys(("log", "log2", "log10"), "log(0) is -Inf")
ARCS = dict.fromkeys(("acos", "arccos", "asin", "arcsin"), "the slope at -1 and 1 is infinite, beyond them it is NaN")
SINGULAR = {**ROOTS, **LOGS, **ARCS, "reciprocal": "1/0 is Inf"}
CLAMPS = {"clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_", "maximum", "max"}
NOT_TENSORS = {"math", "np", "numpy", "cmath", "scipy", "logging", "logger", "log", "writer", "self"}
NOT_VALUES = set("size numel dim item len range int shape ndim device dtype tensor as_tensor full arange".split())
# What yields a number that can be 0: a denominator with one of these wants a guard.
CAN_BE_ZERO = set("sum mean norm vector_norm std var abs max min amax amin square sqrt exp prod relu pow sub".split())
LARGEST = {"max", "amax", "logsumexp"}
BOUNDED = {
    "log_softmax",
    "logsigmoid",
    "log",
    "tanh",
    "sigmoid",
    "softmax",
    "cos",
    "sin",
    "normalize",
    "cosine_similarity",
}
DIVISIONS = {"div", "div_", "true_divide", "divide"}
SMALL = re.compile(r"eps|tiny|small|floor|min_|_min", re.IGNORECASE)


@dataclass
class Scope:
    """A function's names: what was last assigned to each, and which are tensors given to ``forward``."""

    constants: dict  # of the module, {name: number}
    tensors: set = field(default_factory=set)
    assigned: dict = field(default_factory=dict)

    def number(self, node):
        """The value of an arithmetic expression of literals and module constants, else None."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, (int, float)) else None
        if isinstance(node, ast.Name):
            return self.constants.get(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.number(node.operand)
            return None if value is None else -value
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            left, right = self.number(node.left), self.number(node.right)
            if left is not None and right is not None:
                return left + right if isinstance(node.op, ast.Add) else left - right
        return None

    def parts(self, node, depth=4):
        """All nodes that an expression's value comes from, through names assigned before in the same function."""
        for child in _value_nodes(node):
            yield child
            if depth and isinstance(child, ast.Name) and child.id in self.assigned:
                yield from self.parts(self.assigned[child.id], depth - 1)

    def is_tensor(self, node) -> bool:
        """Whether an expression is computed from a tensor, as far as one can see."""
        return any(
            _called(part) in CAN_BE_ZERO | set(SINGULAR)
            or (isinstance(part, ast.Name) and part.id in self.tensors)
            or (isinstance(part, ast.Call) and _owner(part) == "self")  # a layer
            for part in self.parts(node)
        )

    def guarded(self, node, kind: str) -> bool:
        """Whether an operand is kept off the singular point, by a clamp or by a small number added to it."""
        for part in self.parts(node):
            if _called(part) in CLAMPS and self._clamps(part):
                return True
            if kind not in ARCS:
                if _called(part) in ("softplus", "finfo"):
                    return True
                sides = [part.left, part.right] if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Add) else []
                sides += part.args if _called(part) in ("add", "add_") else []
                if any(self._is_small_number(side) for side in sides):
                    return True
        return False

    def division(self, denominator) -> str:
        """Why dividing by an expression is a hazard, '' if it is none."""
        methods = (part for part in self.parts(denominator) if isinstance(getattr(part, "func", None), ast.Attribute))
        if any(_called(part) in CAN_BE_ZERO for part in methods) and not self.guarded(denominator, "/"):
            return "divides by what can be 0"
        return ""

    def bounded(self, node) -> bool:
        """Whether an exponent is kept from growing: by a clamp, by a sign, or by taking the largest one from it."""
        for part in self.parts(node):
            if _called(part) in CLAMPS | BOUNDED or (isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub)):
                return True
            difference = isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub)
            if difference and any(_called(inner) in LARGEST for inner in self.parts(part.right)):
                return True
        return not self.is_tensor(node)

    def _is_small_number(self, node) -> bool:
        value = self.number(node)
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return value > 0 if value is not None else bool(SMALL.search(name))

    def _clamps(self, call) -> bool:
        """Whether a clamp has a bound; one at exactly 0 or 1 keeps the value but not the slope."""
        method = isinstance(call.func, ast.Attribute)
        bounds = call.args[1:] if _owner(call) == "torch" else list(call.args)
        bounds += [k.value for k in call.keywords if k.arg in ("min", "max", "other")]
        if method and _called(call) == "max" and all(self.number(bound) in (0, 1, 2, -1, -2) for bound in bounds):
            return False  # x.max(1) is a maximum over an axis
        values = [self.number(bound) for bound in bounds]
        return any(value is None or abs(value) not in (0, 1) for value in values) and bool(bounds)


def _called(node) -> str:
    """The name of what a call calls, '' for any other node."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _owner(call) -> str:
    """The plain name in front of a call's dot, as 'torch' of torch.sqrt(x), else ''."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    return owner.id if isinstance(owner, ast.Name) else ""


def _value_nodes(node):
    """The nodes below an expression, but for those that yield sizes, constants and plain numbers."""
    name = _called(node) or (node.attr if isinstance(node, ast.Attribute) else "")
    if name in NOT_VALUES or (isinstance(node, ast.Call) and _owner(node) in NOT_TENSORS - {"self"}):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _value_nodes(child)


def hazards(tree: ast.Module) -> list[tuple[int, str, str]]:
    """Find unguarded singular operations: [(line, expression, why)]."""
    constants = Scope({})
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = constants.number(node.value)
            if value is not None:
                constants.constants[node.targets[0].id] = value
    found = set()
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name != "__init__"]:
        scope = Scope(constants.constants)
        if function.name == "forward":
            scope.tensors = {a.arg for a in function.args.args[1:]}
        statements = [n for n in ast.walk(function) if isinstance(n, ast.stmt) and n is not function]
        for statement in sorted(statements, key=lambda n: n.lineno):
            if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Div):
                why = scope.division(statement.value)
                found |= {(statement.lineno, ast.unparse(statement), why)} if why else set()
            for node in _own_expressions(statement):
                why = hazard(node, scope)
                if why:
                    found.add((node.lineno, ast.unparse(node), why))
            for target in statement.targets if isinstance(statement, ast.Assign) else ():
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        scope.assigned[name.id] = statement.value
    return sorted(found)


def _own_expressions(statement):
    """The expressions of a statement, but for those of statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt):
            yield from (n for n in ast.walk(child) if isinstance(n, ast.expr))


def hazard(node, scope: Scope) -> str:
    """Why an expression is singular somewhere, '' if it is guarded or harmless."""
    if isinstance(node, ast.BinOp):
        return _operator_hazard(node, scope)
    name = _called(node)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return ""
    if _owner(node) in NOT_TENSORS:
        return ""
    operand = node.args[0] if _owner(node) in ("torch", "F") and node.args else node.func.value
    if name in DIVISIONS and node.args:
        return scope.division(node.args[-1])
    if name in SINGULAR and any(True for _ in _value_nodes(operand)) and not scope.guarded(operand, name):
        return SINGULAR[name]
    if name in ("exp", "expm1") and not scope.bounded(operand):
        return "Inf above 88 (11 in float16): use softmax, logsumexp or softplus, or bound it"
    if name == "pow" and _fractional(node.args[-1] if node.args else None, scope) and not scope.guarded(operand, name):
        return "NaN of a negative base; at 0 its slope or its value is infinite"
    if name == "std" and not _is_biased(node) and not scope.guarded(operand, name):
        return "NaN over a single frame: divides by n - 1 = 0"
    return ""


def _is_biased(call) -> bool:
    """Whether a deviation is asked for without Bessel's correction."""
    words = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    return words.get("unbiased") is False or words.get("correction") == 0


def _fractional(node, scope) -> bool:
    value = None if node is None else scope.number(node)
    return value is not None and (value < 0 or 0 < value < 1)


def _operator_hazard(node, scope) -> str:
    if isinstance(node.op, ast.Div):
        return scope.division(node.right)
    if not isinstance(node.op, ast.Pow) or not _fractional(node.right, scope) or not scope.is_tensor(node.left):
        return ""
    return "" if scope.guarded(node.left, "pow") else "NaN of a negative base; at 0 its slope or its value is infinite"


def plugin_files(config: Config) -> list[Path]:
    """The files of the chosen plug-ins, and those of models/ and loss/ that they import, in that order."""
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
                if parts[0] in ("models", "loss") and len(parts) == 2:
                    visit(plugins.ROOT / parts[0] / f"{parts[1]}.py")

    for folder, key in plugins.CHOSEN_BY.items():
        visit(plugins.ROOT / folder / f"{getattr(config, key)}.py")
    return files


def check_plugins(config: Config, report):
    """Note unguarded roots, logarithms, arc functions, deviations and divisions in the plug-ins' sources."""
    report.heading("source of the plug-ins")
    files = plugin_files(config)
    rows = [
        (f"{path.relative_to(plugins.ROOT)}:{line}", text if len(text) < 60 else text[:57] + "...", why)
        for path in files
        for line, text, why in hazards(plugins.parse(path))
    ]
    names = ", ".join(str(path.relative_to(plugins.ROOT)) for path in files)
    if rows:
        report.finding("note", "not guarded by a clamp or a small number added, as far as can be seen:", rows)
    else:
        report.line(f"  no unguarded root, logarithm, arc cosine or division in {names}")
