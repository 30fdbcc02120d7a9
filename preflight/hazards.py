"""Operations in the source of a plug-in that are singular somewhere and that nothing keeps off that point."""

import ast
import copy
import re
from dataclasses import dataclass, field
from typing import NamedTuple

ROOTS = {"sqrt": "the slope of a root at 0 is infinite", "rsqrt": "1/sqrt(0) is Inf"}
LOGS = dict.fromkeys(("log", "log2", "log10", "logit"), "log(0) is -Inf")
ARCS = dict.fromkeys(
    ("acos", "arccos", "asin", "arcsin", "atanh", "arctanh"),
    "the slope at -1 and 1 is infinite, beyond them it is NaN",
)
SINGULAR = {**ROOTS, **LOGS, **ARCS, "reciprocal": "1/0 is Inf"}
EXPONENTIALS = {"exp", "exp2", "expm1"}
DEVIATIONS = {"std", "var", "std_mean", "var_mean"}
CLAMPS = {"clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_", "maximum", "max"}
CHOICES = {"where", "masked_fill", "masked_fill_"}  # a value is put in the place of another one
NAMESPACES = {"torch", "F", "functional", "linalg", "special"}
NOT_TENSORS = {"math", "np", "numpy", "cmath", "scipy", "logging", "logger", "log", "writer", "self"}
NOT_VALUES = set("size numel dim len range int shape ndim device dtype tensor as_tensor full arange".split())
# What yields a number that can be 0: a denominator with one of these wants a guard.
CAN_BE_ZERO = set("sum mean norm vector_norm std var abs max min amax amin square sqrt exp prod relu pow sub".split())
CAN_BE_ZERO |= {"count_nonzero", "nansum", "std_mean", "var_mean", "einsum", "cumprod", "bincount"}
NOT_NEGATIVE = set("abs square relu sqrt exp sigmoid softmax softplus norm vector_norm std var cosh".split())
LARGEST = {"max", "amax", "logsumexp"}
BOUNDED = set("log_softmax logsigmoid log tanh sigmoid softmax cos sin normalize cosine_similarity".split())
SOFTMAXES = {"softmax", "log_softmax", "logsumexp", "cross_entropy", "scaled_dot_product_attention"}
DIVISIONS = {"div", "true_divide", "divide"}
SMALL = re.compile(r"eps|tiny|small|least|floor|min_|_min", re.IGNORECASE)
ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)
LONGEST_OPERAND = 32  # characters of it that a line repeats; "x" stands for a longer one


class Hazard(NamedTuple):
    """A line, the expression in it, what can happen, and what to write instead."""

    line: int
    code: str
    why: str
    instead: str


@dataclass
class Scope:
    """A function's names: what was last assigned to each, and which are known to be tensors."""

    constants: dict  # of the module and of self, {'EPS': number, 'self.power': number}
    tensors: set = field(default_factory=set)
    counters: set = field(default_factory=set)  # of loops
    assigned: dict = field(default_factory=dict)
    softmax: bool = False  # whether the function takes a softmax

    def number(self, node):
        """The value of an arithmetic expression of literals and constants, else None."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, (int, float)) else None
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self.constants.get(ast.unparse(node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.number(node.operand)
            return None if value is None else -value
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Div)):
            left, right = self.number(node.left), self.number(node.right)
            if left is not None and right is not None and not (isinstance(node.op, ast.Div) and right == 0):
                if isinstance(node.op, ast.Div):
                    return left / right
                return left + right if isinstance(node.op, ast.Add) else left - right
        return None

    def parts(self, node, depth=4, outside=None):
        """All nodes that an expression's value comes from, through names assigned before in the same function.

        ``outside(node)``: whether what is below a node does not count.
        """
        for child in _value_nodes(node, outside):
            yield child
            if depth and isinstance(child, ast.Name) and child.id in self.assigned:
                yield from self.parts(self.assigned[child.id], depth - 1, outside)

    def resolved(self, node):
        """The expression that was last assigned to a name; any other node as it is."""
        return self.assigned.get(node.id, node) if isinstance(node, ast.Name) else node

    def is_tensor(self, node) -> bool:
        """Whether an expression is computed from a tensor, as far as one can see."""
        return any(
            _called(part) in CAN_BE_ZERO | set(SINGULAR)
            or (isinstance(part, ast.Name) and part.id in self.tensors)
            or (isinstance(part, ast.Call) and _owner(part) in ("self", "F"))  # a layer
            or (isinstance(part, ast.Attribute) and ast.unparse(part) in self.tensors)
            for part in self.parts(node)
        )

    def guarded(self, node, kind: str) -> bool:
        """Whether an operand is kept off the singular point, by a clamp or by a small number added to it."""
        for part in self.parts(node, outside=None if kind == "/" else self._hides):
            if _called(part) in CLAMPS and self._clamps(part, kind):
                return True
            if kind not in ARCS:
                if _called(part) in {"softplus", "finfo"} | CHOICES:
                    return True
                sides = [part.left, part.right] if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Add) else []
                sides += part.args if _called(part) in ("add", "add_") else []
                if any(self._is_small_number(side) for side in sides):
                    return True
        return False

    def _hides(self, node) -> bool:
        """Whether a guard below a node is none any more above it: in a difference, and before a layer."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
            return self.number(node.left) is None and self.number(node.right) is None
        return isinstance(node, ast.Call) and _owner(node) == "self"

    def not_negative(self, node) -> bool:
        """Whether an operand can be seen to be 0 or above."""
        node = self.resolved(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            return (self.number(node.right) or 1) % 2 == 0
        name = _called(node)
        if name in CLAMPS:
            bounds = [*node.args, *(k.value for k in node.keywords if k.arg == "min")]
            return any(self.number(bound) is not None and self.number(bound) >= 0 for bound in bounds)
        if name in ("sum", "mean", "amax", "amin", "float") and isinstance(node.func, ast.Attribute):
            return self.not_negative(_operand(node))
        if name == "pow" and len(node.args) > 0:
            return (self.number(node.args[-1]) or 1) % 2 == 0
        return name in NOT_NEGATIVE

    def division(self, denominator) -> bool:
        """Whether an expression is a denominator that can be 0."""
        methods = (part for part in self.parts(denominator) if isinstance(getattr(part, "func", None), ast.Attribute))
        return any(_called(part) in CAN_BE_ZERO for part in methods) and not self.guarded(denominator, "/")

    def bounded(self, node) -> bool:
        """Whether an exponent is kept from growing: by a clamp, by a sign, or by taking the largest one from it."""
        for part in self.parts(node):
            if _called(part) in CLAMPS | BOUNDED or (isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub)):
                return True
        return self.less_largest(node) or not self.is_tensor(node)

    def less_largest(self, node) -> bool:
        """Whether the largest value, which is computed somewhere in it, is taken from an expression."""
        return any(
            _called(inner) in LARGEST
            for part in self.parts(node)
            if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub)
            for inner in self.parts(part.right)
        )

    def exponent_of_softmax(self, numerator, denominator):
        """The operand x of a softmax by hand, exp(x) / exp(x).sum(); None if a quotient is none."""
        sums = [_operand(part) for part in self.parts(denominator) if _called(part) == "sum"]
        below = [self.resolved(node) for node in sums if node is not None]
        above = self.resolved(numerator)
        if _called(above) == "exp" and any(ast.unparse(node) == ast.unparse(above) for node in below):
            return _operand(above)
        return None

    def _is_small_number(self, node) -> bool:
        value = self.number(node)
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return value > 0 if value is not None else bool(SMALL.search(name))

    def _clamps(self, call, kind: str) -> bool:
        """Whether a clamp has a bound; one at exactly 0 or 1 keeps the value but not the slope."""
        method = isinstance(call.func, ast.Attribute)
        positional = call.args[1:] if _owner(call) == "torch" else list(call.args)
        bounds = positional + [k.value for k in call.keywords if k.arg in ("min", "max", "other")]
        if method and _called(call) == "max" and all(self.number(bound) in (0, 1, 2, -1, -2) for bound in bounds):
            return False  # x.max(1) is a maximum over an axis
        lowest = positional[:1] if method else positional  # max(count, 1) of numbers may have them in any order
        lowest += [k.value for k in call.keywords if k.arg == "min"]
        if kind not in ARCS and any(self.number(bound) == 1 for bound in lowest):
            return True  # a count
        values = [self.number(bound) for bound in bounds]
        return any(value is None or abs(value) not in (0, 1) for value in values) and bool(bounds)

    # --------------------------------------------------------------------------------------------- reading a function

    def remember(self, statement):
        """Note what a statement assigns, in place too."""
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        self.assigned[name.id] = statement.value
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            self._change(statement.target.id, as_binary(statement))
        elif isinstance(statement, ast.Expr) and _called(statement.value).endswith("_"):
            owner = _owner(statement.value)
            if owner:
                self._change(owner, statement.value)

    def _change(self, name: str, value):
        """Assign an expression in which the name itself stands for what it was before."""
        before = self.assigned.get(name)
        if before is not None:
            value = _Renamed(name, before).visit(copy.deepcopy(value))
        self.assigned[name] = value


class _Renamed(ast.NodeTransformer):
    """Writes an expression in the place of a name."""

    def __init__(self, name: str, value):
        self.name, self.value = name, value

    def visit_Name(self, node):
        """Replace the name."""
        return self.value if node.id == self.name else node


# ------------------------------------------------------------------------------------------------ expressions


def _called(node) -> str:
    """The name of what a call calls, '' for any other node."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _owner(call) -> str:
    """The plain name in front of a call's dot, as 'torch' of torch.sqrt(x), else ''."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    return owner.id if isinstance(owner, ast.Name) else ""


def _operand(call):
    """What a call computes with first: x of torch.exp(x) and of x.exp(); None if nothing is given."""
    base = call.func.value if isinstance(call.func, ast.Attribute) else None
    if base is None or getattr(base, "attr", getattr(base, "id", "")) in NAMESPACES:
        return call.args[0] if call.args else None
    return base


def _value_nodes(node, outside=None):
    """The nodes below an expression, but for those that yield sizes, constants and plain numbers."""
    name = _called(node) or (node.attr if isinstance(node, ast.Attribute) else "")
    if name in NOT_VALUES or (isinstance(node, ast.Call) and _owner(node) in NOT_TENSORS - {"self"}):
        return
    yield node
    if outside is None or not outside(node):
        for child in ast.iter_child_nodes(node):
            yield from _value_nodes(child, outside)


def as_binary(statement: ast.AugAssign) -> ast.BinOp:
    """The expression x + y of a statement x += y."""
    node = ast.BinOp(left=statement.target, op=statement.op, right=statement.value)
    return ast.copy_location(node, statement)


def shown(node) -> str:
    """An operand as text to which a method can be appended."""
    text = ast.unparse(node)
    if len(text) > LONGEST_OPERAND:
        return "x"
    return text if isinstance(node, ATOMS) else f"({text})"


# ------------------------------------------------------------------------------------------------ a file


def hazards(tree: ast.Module) -> list[Hazard]:
    """Find unguarded singular operations of a file, in the order of its lines."""
    found = set()
    constants = numbers_of(tree)
    for owner in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]:
        own = constants if owner is tree else {**constants, **attributes_of(owner, constants)}
        parameters = set() if owner is tree else parameters_of(owner)
        for function in owner.body:
            if isinstance(function, ast.FunctionDef) and function.name != "__init__":
                found |= hazards_of(function, own, parameters)
    return sorted(found)


def numbers_of(tree: ast.Module) -> dict:
    """The numbers that a module gives to names."""
    scope = Scope({})
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = scope.number(node.value)
            if value is not None:
                scope.constants[node.targets[0].id] = value
    return scope.constants


def attributes_of(owner: ast.ClassDef, constants: dict) -> dict:
    """The numbers {'self.power': 2} that a class keeps, where __init__ writes them or has them as a default."""
    found: dict = {}
    for function in [n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]:
        args = function.args
        defaults = dict(zip([a.arg for a in args.args][::-1], args.defaults[::-1]))
        defaults |= {a.arg: value for a, value in zip(args.kwonlyargs, args.kw_defaults) if value is not None}
        outside = Scope(constants)
        given = Scope({**constants, **{name: outside.number(value) for name, value in defaults.items()}})
        for node in ast.walk(function):
            for target in node.targets if isinstance(node, ast.Assign) else ():
                for name, value in zip(*_pairs(target, node.value)):
                    number = given.number(value)
                    if isinstance(name, ast.Attribute) and number is not None:
                        found[ast.unparse(name)] = number
    return found


def parameters_of(owner: ast.ClassDef) -> set[str]:
    """The attributes {'self.gain'} to which a class gives a learnable tensor."""
    given = [n for n in ast.walk(owner) if isinstance(n, ast.Assign) and _called(n.value) == "Parameter"]
    return {ast.unparse(target) for node in given for target in node.targets}


def _pairs(target, value) -> tuple[list, list]:
    """Targets and values of an assignment, one by one."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return target.elts, value.elts
    return [target], [value]


def hazards_of(function: ast.FunctionDef, constants: dict, parameters: set[str]) -> set[Hazard]:
    """Find the hazards of a function, its inner functions included; ``parameters``: tensors that its object has."""
    nodes = list(ast.walk(function))
    scope = Scope(constants, softmax=any(_called(node) in SOFTMAXES for node in nodes))
    given = {a.arg for a in function.args.args[1:]}
    used = {n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    scope.tensors = parameters | (given if function.name == "forward" else given & used)
    loops = [n.target for n in nodes if isinstance(n, (ast.For, ast.comprehension))]
    scope.counters = {n.id for target in loops for n in ast.walk(target) if isinstance(n, ast.Name)}
    found: dict[int, Hazard] = {}  # by the node
    by_hand = set()  # exponentials of a softmax
    statements = [n for n in nodes if isinstance(n, ast.stmt) and n is not function]
    for statement in sorted(statements, key=lambda n: n.lineno):
        own = [as_binary(statement)] if isinstance(statement, ast.AugAssign) else []
        for node in [*own, *_own_expressions(statement)]:
            why = hazard(node, scope)
            if why:
                code = statement if node in own else node
                found[id(node)] = Hazard(node.lineno, ast.unparse(code), *why)
                if isinstance(node, ast.BinOp) and "softmax by hand" in why[0]:
                    by_hand |= {id(part) for part in scope.parts(node) if _called(part) == "exp"}
        infinite = infinite_mask(statement, scope)
        if infinite:
            found[id(statement)] = Hazard(statement.lineno, ast.unparse(statement), *infinite)
        scope.remember(statement)
    return {hazard for node, hazard in found.items() if node not in by_hand}


def _own_expressions(statement):
    """The expressions of a statement, but for those of statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt):
            yield from (n for n in ast.walk(child) if isinstance(n, ast.expr))


# ------------------------------------------------------------------------------------------------ the hazards


def hazard(node, scope: Scope) -> tuple[str, str] | None:
    """(why an expression is singular somewhere, what to write instead); None if it is guarded or harmless."""
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Div):
            return quotient(node.left, node.right, scope)
        return power(node.left, node.right, scope) if isinstance(node.op, ast.Pow) else None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or _owner(node) in NOT_TENSORS:
        return None
    name, operand = _called(node).rstrip("_"), _operand(node)
    if operand is None:
        return None
    if name in DIVISIONS and node.args:
        return quotient(operand, node.args[-1], scope)
    if name == "pow" and node.args:
        return power(operand, node.args[-1], scope)
    if name in SINGULAR and any(True for _ in _value_nodes(operand)) and not scope.guarded(operand, name):
        given = [*node.args, *(keyword for keyword in node.keywords if keyword.arg != "out")]
        if len(given) > (operand is not node.func.value):
            return None  # the eps of logit, or no tensor's method: x.log() takes nothing
        return SINGULAR[name], floor_of(name, operand, scope)
    if name in EXPONENTIALS and not scope.bounded(operand):
        instead = f"softmax, logsumexp or softplus, or torch.{name}({shown(operand)}.clamp(max=10))"
        return "Inf above 88 (11 in float16)", instead
    if name in DEVIATIONS and not _is_biased(node):
        return deviation(node)
    return infinite_fill(node, name, scope)


def floor_of(name: str, operand, scope: Scope) -> str:
    """A root, logarithm, arc function or reciprocal with a guard."""
    inner = _called(scope.resolved(operand))
    if name == "log" and inner in ("softmax", "sigmoid"):
        return {"softmax": "F.log_softmax(x, dim=..)", "sigmoid": "F.logsigmoid(x)"}[inner]
    if name in ARCS:
        return f"torch.{name}({shown(operand)}.clamp(-1 + 1e-6, 1 - 1e-6))"
    if name == "logit":
        return f"torch.logit({shown(operand)}, eps=1e-6)"
    return f"torch.{name}({shown(operand)}.clamp(min=1e-6))"


def quotient(numerator, denominator, scope: Scope) -> tuple[str, str] | None:
    """The hazard of a division."""
    exponent = scope.exponent_of_softmax(numerator, denominator)
    if exponent is not None:
        if scope.less_largest(exponent):
            return None  # the sum has a 1 in it
        return "softmax by hand: Inf/Inf or 0/0", f"torch.softmax({shown(exponent)}, dim=..)"
    if not scope.division(denominator):
        return None
    if any(_called(part) == "item" for part in scope.parts(denominator)):
        return "divides by what can be 0", f"/ max({ast.unparse(denominator)}, 1)"
    if _called(scope.resolved(denominator)) in ("norm", "vector_norm"):
        return "divides by what can be 0", f"F.normalize, or / {shown(denominator)}.clamp(min=1e-6)"
    return "divides by what can be 0", f"/ {shown(denominator)}.clamp(min=1e-6)"


def power(base, exponent, scope: Scope) -> tuple[str, str] | None:
    """The hazard of a power whose exponent is negative, or no whole number as far as can be seen."""
    value = scope.number(exponent)
    counter = isinstance(exponent, ast.Name) and exponent.id in scope.counters
    if counter or isinstance(value, complex) or not scope.is_tensor(base) or scope.guarded(base, "pow"):
        return None
    instead = f"{shown(base)}.clamp(min=1e-6) ** {shown(exponent)}"
    if value is None:
        if scope.not_negative(base) or not isinstance(exponent, (ast.Name, ast.Attribute)):
            return None
        return f"NaN of a negative base unless {ast.unparse(exponent)} is a whole number", instead
    if value > 1:
        if value == int(value) or scope.not_negative(base):
            return None
        return "NaN of a negative base", instead
    if value in (0, 1):
        return None
    return "NaN of a negative base; at 0 its slope or its value is infinite", instead


def deviation(node) -> tuple[str, str]:
    """The hazard of a deviation with Bessel's correction."""
    keywords = [k for k in node.keywords if k.arg not in ("unbiased", "correction")]
    given = [ast.unparse(argument) for argument in node.args]
    given += [ast.unparse(k) for k in keywords] + ["correction=0"]
    instead = f"{ast.unparse(node.func)}({', '.join(given)})"
    return "NaN over a single frame: divides by n - 1 = 0", instead


def _is_biased(call) -> bool:
    """Whether a deviation is asked for without Bessel's correction."""
    words = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    return words.get("unbiased") is False or words.get("correction") == 0 or _owner(call) == "nn"


# A row that is masked whole has nothing but -Inf: its softmax is 0/0.
MASKED = "NaN after softmax where a whole row is masked"
NEVER_WHOLE = {"eye", "one_hot", "tril", "triu", "any", "diag"}  # a mask with one of these spares something
FINITE = "torch.finfo(x.dtype).min"


def infinite_fill(node, name: str, scope: Scope) -> tuple[str, str] | None:
    """The hazard of masked_fill and where with an infinite value, in a function that takes a softmax."""
    position = {"masked_fill": -1, "where": slice(1, None)}.get(name)
    if position is None or not scope.softmax or not node.args:
        return None
    values = node.args[position] if isinstance(position, slice) else [node.args[position]]
    values += [k.value for k in node.keywords if k.arg == "value"]
    mask = node.args[0]
    if any(_called(part) in NEVER_WHOLE for part in scope.parts(mask)):
        return None
    return (MASKED, f"{FINITE} in the place of -inf") if any(map(negative_infinity, values)) else None


def infinite_mask(statement, scope: Scope) -> tuple[str, str] | None:
    """The hazard of ``scores[mask] = -inf``."""
    if not scope.softmax or not isinstance(statement, ast.Assign) or not negative_infinity(statement.value):
        return None
    if not isinstance(statement.targets[0], ast.Subscript):
        return None
    return MASKED, f"{ast.unparse(statement.targets[0])} = {FINITE}"


def negative_infinity(node) -> bool:
    """Whether an expression is written as minus infinite: -math.inf, float('-inf'), -float('inf')."""
    text = ast.unparse(node).replace("'", "").replace('"', "").lower()
    return (
        re.fullmatch(r"float\(-inf(inity)?\)|-(float\(inf(inity)?\)|(torch|math|np|numpy)\.inf|inf)", text) is not None
    )
