"""Stable forms of logarithms, exponentials and what is cast to 16 bit, made on the syntax tree."""

import ast
import math
from collections.abc import Iterator

from postmortem.source_tree import Edit, Operation, Source, literal

INDEXING = frozenset(
    "gather index_select squeeze unsqueeze view reshape flatten t transpose permute masked_select take_along_dim"
    " diagonal narrow select clone contiguous".split()
)
BOUNDS = ("clamp", "clip", "clamp_min")
BESSEL = ("i0", "i1")  # modified Bessel functions; i0e and i1e are those over exp(|x|)
LONGEST = 60  # characters of an expression that may be written twice


def functional(source: Source) -> str:
    """The name of torch.nn.functional in a file."""
    for node in ast.walk(source.tree):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            if alias.name in ("torch.nn.functional", "functional"):
                return alias.asname or alias.name
    return "torch.nn.functional"


def stable_logarithms(source: Source, operation: Operation, of=None) -> Iterator[tuple[str, list[Edit]]]:
    """Changes of a logarithm that give it without computing what may vanish or overflow.

    ``of``: only if this exponential is what the logarithm is taken of.
    """
    if not operation.operands or operation.name not in ("log", "log1p") or operation.number:
        return
    whole = source.span(operation.node)
    factor = source.parents.get(operation.node)
    if isinstance(factor, ast.BinOp) and isinstance(factor.op, ast.Mult) and of is None and operation.name == "log":
        other = factor.left if factor.right is operation.node else factor.right
        if source.code(other) == source.code(operation.operands[0]):
            code = source.code(other)
            yield "use xlogy, which is 0 at 0", [source.replaced(factor, f"torch.xlogy({code}, {code})")]
    changed = log_of(source, operation.operands[0], of, one_more=operation.name == "log1p")
    if changed is not None:
        words, text = changed
        yield f"use {words} instead of the logarithm", [Edit(*whole, text)]


def every_logarithm(source: Source, operations: list[Operation]) -> Iterator[tuple[str, list[Edit]]]:
    """The change of several logarithms of a statement at once: one that is left fails on another batch."""
    found = [next(stable_logarithms(source, operation), None) for operation in operations]
    changes = [change for change in found if change is not None]
    if len(changes) > 1:
        yield changes[0][0].replace("the logarithm", "each logarithm"), [edit for _, edits in changes for edit in edits]


def log_of(source: Source, node, of=None, one_more: bool = False) -> tuple[str, str] | None:
    """(name, text) of the stable form of the logarithm of an expression; None if there is none."""
    node = source.resolved(node)
    f = functional(source)
    if one_more or (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))):
        return log_of_sum(source, node, f, of, one_more)
    operation = source.operation(node)
    if isinstance(node, ast.Subscript) or (operation is not None and operation.name in (*INDEXING, *BOUNDS)):
        inner = node.value if isinstance(node, ast.Subscript) else operation.operands[0]
        found = log_of(source, inner, of)
        if found is None or (operation is not None and operation.name in BOUNDS):
            return found
        start, end = source.span(inner)
        first, last = source.span(node)
        return found[0], source.text[first:start] + found[1] + source.text[end:last]
    if operation is None or not operation.operands:
        return None
    argument = source.code(operation.operands[0])
    rest = [source.code(n) for n in operation.operands[1:]]
    rest += [f"{key}={source.code(value)}" for key, value in operation.keywords.items()]
    if operation.name == "softmax" and of is None:
        return "log_softmax", f"{f}.log_softmax({', '.join([argument, *rest])})"
    if operation.name == "sigmoid" and of is None:
        return "logsigmoid", f"{f}.logsigmoid({argument})"
    if operation.name in BESSEL and of is None and len(argument) <= LONGEST:
        size = f"({argument}).abs()"
        return (
            f"the scaled {operation.name}e",
            f"(torch.log(torch.special.{operation.name}e({argument})) + {size})",
        )
    if operation.name == "exp" and of in (None, node):
        return "the exponent", argument
    if operation.name in ("sinh", "cosh") and of in (None, node) and len(argument) <= LONGEST:
        return f"a stable form of log {operation.name}", log_of_hyperbolic(
            operation.name, source.operand(operation.operands[0])[2], f
        )
    if operation.name == "sum" and rest:
        inner = source.resolved(operation.operands[0])
        power = source.operation(inner)
        if power is not None and power.name == "exp" and of in (None, inner):
            return "logsumexp", f"torch.logsumexp({', '.join([source.code(power.operands[0]), *rest])})"
        terms, powers = log_terms(source, inner)
        if powers and of in (None, *powers):
            text = " ".join(f"{sign} {term}" for sign, term in terms).removeprefix("+ ")
            return "logsumexp", f"torch.logsumexp({', '.join([text, *rest])})"
    if operation.name == "div":
        found = softmax_of(source, operation)
        if found is not None and of in (None, found[2]):
            return "log_softmax", f"{f}.log_softmax({found[0]}, dim={found[1]})"
    return None


def log_terms(source: Source, node, sign: str = "+") -> tuple[list[tuple[str, str]], list]:
    """The logarithm of a product as a sum: (sign, text) of its terms, and the exponentials among its factors."""
    node = source.resolved(node)
    operation = source.operation(node)
    name = operation.name if operation is not None and operation.operands else ""
    if name in ("mul", "div") and isinstance(node, ast.BinOp):
        other = sign if name == "mul" else {"+": "-", "-": "+"}[sign]
        left, right = log_terms(source, node.left, sign), log_terms(source, node.right, other)
        return left[0] + right[0], left[1] + right[1]
    if name == "exp":
        return [(sign, source.operand(operation.operands[0])[2])], [node]
    if name == "softmax":
        return [(sign, log_of(source, node)[1])], []
    number = literal(node)
    if number is not None and number > 0:
        return [(sign, repr(math.log(number)))], []
    return [(sign, f"torch.log({source.code(node)})")], []


def log_of_hyperbolic(name: str, argument: str, f: str) -> str:
    """The logarithm of sinh or cosh without the exponentials that overflow: |x| +- log(1 +- e^(-2|x|)) - log 2."""
    size = f"{argument}.abs()" if name == "cosh" else argument
    rest = f"{f}.softplus(-2 * {size})" if name == "cosh" else f"torch.log1p(-torch.exp(-2 * {size}))"
    return f"({size} + {rest} - {math.log(2)})"


def log_of_sum(source: Source, node, f: str, of, one_more: bool) -> tuple[str, str] | None:
    """log(1 + exp(x)) and log1p(exp(x)) are softplus(x); log(1 - sigmoid(x)) is logsigmoid(-x)."""
    if one_more:
        one, other, sign = True, node, ast.Add
    else:
        parts = (node.left, node.right)
        one = any(literal(part) == 1 for part in parts)
        other = next((part for part in parts if literal(part) is None), None)
        sign = type(node.op)
        if sign is ast.Sub and literal(node.left) != 1:
            return None
    if not one or other is None:
        return None
    inner = source.resolved(other)
    operation = source.operation(inner)
    if operation is None or not operation.operands:
        return None
    argument = source.code(operation.operands[0])
    if sign is ast.Add and operation.name == "exp" and of in (None, inner):
        return "softplus", f"{f}.softplus({argument})"
    if sign is ast.Sub and operation.name == "sigmoid" and of is None:
        return "logsigmoid", f"{f}.logsigmoid(-({argument}))"
    return None


def softmax_of(source: Source, division: Operation):
    """(argument, dim, exponential) if a division is exp(x) / exp(x).sum(dim); None if it is another."""
    upper = source.resolved(division.operands[0])
    exponential = source.operation(upper)
    total = source.operation(source.resolved(division.operands[1]))
    if exponential is None or total is None or exponential.name != "exp" or total.name != "sum":
        return None
    if source.code(source.resolved(total.operands[0])) != source.code(upper):
        return None
    dim = total.keywords.get("dim", total.operands[1] if len(total.operands) > 1 else None)
    return None if dim is None else (source.code(exponential.operands[0]), source.code(dim), upper)


def stable_softmax(source: Source, operation: Operation) -> Iterator[tuple[str, list[Edit]]]:
    """Write softmax in the place of an exponential that is divided by its own sum."""
    for node in ast.walk(source.function(operation.node)):
        division = source.operation(node)
        if division is None or division.name != "div" or isinstance(node, ast.AugAssign):
            continue
        found = softmax_of(source, division)
        if found is not None and found[2] is operation.node:
            text = f"torch.softmax({found[0]}, dim={found[1]})"
            yield "use softmax", [source.replaced(node, text)]


def scaled_bessel(source: Source, operation: Operation) -> Iterator[tuple[str, list[Edit]]]:
    """Write i0e and i1e in a ratio of Bessel functions of one argument: what they leave out cancels."""
    for node in ast.walk(source.function(operation.node)):
        division = source.operation(node)
        if division is None or division.name != "div" or isinstance(node, ast.AugAssign):
            continue
        parts = [source.operation(source.resolved(operand)) for operand in division.operands]
        if all(part is not None and part.name in BESSEL and part.operands for part in parts):
            upper, lower = parts
            if operation.node in (upper.node, lower.node) and source.code(upper.operands[0]) == source.code(
                lower.operands[0]
            ):
                ratio = " / ".join(f"torch.special.{part.name}e({source.code(part.operands[0])})" for part in parts)
                yield "use the scaled Bessel functions i0e and i1e", [source.replaced(node, ratio)]


def shifted_exponential(source: Source, operation: Operation) -> Iterator[tuple[str, list[Edit]]]:
    """Subtract the largest exponent, which leaves the share of each element in a sum as it is."""
    code = source.operand(operation.operands[0])[2]
    if len(code) > LONGEST:
        return
    dims = []
    for node in ast.walk(source.function(operation.node)):
        total = source.operation(node)
        if total is not None and total.name == "sum":
            dim = total.keywords.get("dim", total.operands[1] if len(total.operands) > 1 else None)
            dims += [source.code(dim)] if dim is not None else []
    for dim in dict.fromkeys(dims):
        start, end, _ = source.operand(operation.operands[0])
        after = f"{code} - {code}.detach().amax(dim={dim}, keepdim=True)"
        yield "subtract the largest exponent first", [Edit(start, end, after)]


def replaced_mask(source: Source, operation: Operation, statement) -> Iterator[tuple[str, list[Edit]]]:
    """Write -1e4 in the place of -inf: in the statement, the function, the class, or the file."""
    words = "mask with -1e4, not with -inf"
    for scope in (statement, source.function(operation.node), source.class_of(operation.node), source.tree):
        places = source.infinities(scope) if scope is not None else []
        if places:
            yield words, [source.replaced(node, "1e4" if value > 0 else "-1e4") for node, value in places]
            break
    mask = operation.keywords.get("attn_mask")
    if operation.name == "scaled_dot_product_attention" and mask is not None:
        start, end, text = source.operand(mask)
        query = source.operand(operation.operands[0])[2]
        yield words, [Edit(start, end, f"torch.where({text}, 0.0, -1e4).to({query}.dtype)")]


def boolean_masks(source: Source, operation: Operation) -> Iterator[tuple[str, list[Edit]]]:
    """Add -1e4 where an attention has a boolean mask, which writes -inf and is NaN where all is masked."""
    for key in ("key_padding_mask", "src_key_padding_mask"):
        mask = operation.keywords.get(key)
        if mask is not None:
            start, end, text = source.operand(mask)
            yield "mask with -1e4, not with -inf", [Edit(start, end, f"{text}.float() * -1e4")]


def without_casts(source: Source, inside) -> list[Edit]:
    """Edits that make a cast to float32 of each cast to 16 bit."""
    edits = []
    for node in ast.walk(inside):
        operation = source.operation(node)
        if operation is not None and operation.name in ("half", "bfloat16") and operation.method:
            end = source.span(operation.node.func)[1]
            edits.append(Edit(end - len(operation.node.func.attr), end, "float"))
    return edits
