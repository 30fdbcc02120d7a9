"""How one operation of a line is kept finite: the makers of changes, each for the operations that it names."""

import ast
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from postmortem.source_tree import Edit, Operation, Source, literal
from postmortem.stable_forms import (
    LONGEST,
    replaced_mask,
    scaled_bessel,
    shifted_exponential,
    stable_logarithms,
    stable_softmax,
    without_casts,
)

Change = tuple[str, list[Edit]]  # in words, and as edits


@dataclass(frozen=True)
class Line:
    """The line to rewrite: its file, its statement, the floors to try, and what is known of the operands."""

    source: Source
    statement: ast.stmt
    floors: tuple
    half: bool = False  # it computes in float16
    below_one: tuple = ("1e-6", "1e-7", "6e-8", "1e-4")  # distances from 1 to try; 1 - 6e-8 is the next below 1
    of_numbers: bool = False  # what is not known to be a tensor is taken for a plain number
    divisor_positive: bool | None = None  # None if the divisor is not known to be a tensor of floating-point numbers
    divisor_whole: bool = False  # it is of whole numbers, or a plain number


@dataclass(frozen=True)
class Rule:
    """Names of operations in the code, names of operations at fault that it mends, and the maker of its changes."""

    names: frozenset
    faults: frozenset
    changes: Callable[[Line, Operation], Iterator[Change]]


RULES: list[Rule] = []


def rule(names: str, faults: str = ""):
    """Register a maker of changes for operations of these names in the code."""

    def add(changes):
        RULES.append(Rule(frozenset(names.split()), frozenset((names + " " + faults).split()), changes))
        return changes

    return add


# ------------------------------------------------------------------------------------------------ parts of a change


def at_least(line: Line, operation: Operation, node, floor: str) -> list[Edit]:
    """Edits that keep an operand at ``floor`` or above; a bound that is there already is moved."""
    source = line.source
    inner = source.operation(node)
    if inner is not None and inner.name in ("clamp", "clip", "clamp_min"):
        bound = inner.keywords.get("min", inner.operands[1] if len(inner.operands) > 1 else None)
        if bound is not None and literal(bound) is not None:
            return [source.replaced(bound, floor)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for part in (node.right, node.left):
            value = literal(part)
            if value is not None and 0 <= value < float(floor):
                return [source.replaced(part, floor)]
    return wrapped(line, operation, node, f".clamp(min={floor})", f"max({{}}, {floor})")


def wrapped(line: Line, operation: Operation, node, method: str, of_number: str = "") -> list[Edit]:
    """Edits that append a method call to an operand, or wrap an operand that is a plain number."""
    source = line.source
    start, end, text = source.operand(node)
    number = operation.number or line.of_numbers
    after = of_number.format(source.code(node)) if number and of_number else text + method
    statement = operation.node
    if isinstance(statement, ast.AugAssign) and node is statement.target:  # x **= p: an expression cannot be a target
        sign = {ast.Pow: "**", ast.Div: "/", ast.Mult: "*"}[type(statement.op)]
        return [source.replaced(statement, f"{text} = {after} {sign} {source.operand(statement.value)[2]}")]
    return [Edit(start, end, after)]


def exponent_of(operation: Operation) -> float | None:
    """The exponent of a power if it is written as a number."""
    exponent = operation.operands[1] if len(operation.operands) > 1 else operation.keywords.get("exponent")
    return None if exponent is None else literal(exponent)


# ------------------------------------------------------------------------------------------------------------- rules


@rule("log log2 log10", "log_softmax logsumexp exp special_i0 special_i1 sinh cosh softmax sigmoid mul")
def logarithm(line, operation):
    """Use the stable form of a logarithm of a softmax, a sigmoid or a sum of exponentials."""
    if not operation.number:
        yield from stable_logarithms(line.source, operation)


@rule("sqrt rsqrt log log2 log10 xlogy", "pow special_xlogy")
def positive_operand(line, operation):
    """Keep the operand above zero; of a logarithm far less may be needed, if what follows takes it back with exp."""
    tiny = ("1e-20", "1e-30") if operation.name.startswith("log") and not line.half else ()
    # The plain number is mostly a count, as of steps, and its logarithm should not fall below that of the first.
    counted = ("1",) if operation.name.startswith("log") and (operation.number or line.of_numbers) else ()
    place = int(operation.name == "xlogy")
    for floor in (*counted, *line.floors, *tiny) if len(operation.operands) > place else ():
        words = f"keep the operand of {operation.name} at {floor} or above"
        yield words, at_least(line, operation, operation.operands[place], floor)


@rule("log1p")
def above_minus_one(line, operation):
    """Keep the operand above -1."""
    for floor in line.floors:
        change = wrapped(
            line, operation, operation.operands[0], f".clamp(min=-1 + {floor})", f"max({{}}, -1 + {floor})"
        )
        yield f"keep the operand of log1p above -1 by {floor}", change


@rule("acos arccos asin arcsin atanh arctanh erfinv")
def inside_one(line, operation):
    """Keep the operand inside -1 and 1, where the slope is finite."""
    for floor in line.below_one:
        node, source = operation.operands[0], line.source
        inner = source.operation(node)
        words = f"keep the operand of {operation.name} inside -1 + {floor} and 1 - {floor}"
        bounds = [*inner.operands[1:3], *inner.keywords.values()] if inner and inner.name in ("clamp", "clip") else []
        if len(bounds) == 2 and all(literal(bound) is not None for bound in bounds):
            low, high = sorted(bounds, key=literal)
            yield words, [source.replaced(low, f"-1 + {floor}"), source.replaced(high, f"1 - {floor}")]
        else:
            number = f"min(max({{}}, -1 + {floor}), 1 - {floor})"
            yield words, wrapped(line, operation, node, f".clamp(-1 + {floor}, 1 - {floor})", number)


@rule("digamma psi lgamma gammaln polygamma multigammaln", "mul")
def above_pole(line, operation):
    """Keep the operand above zero, where the function is infinite."""
    for floor in line.floors:
        node = operation.operands[operation.name == "polygamma" and not operation.method]
        yield f"keep the operand of {operation.name} at {floor} or above", at_least(line, operation, node, floor)


@rule("acosh arccosh")
def above_one(line, operation):
    """Keep the operand above 1."""
    for floor in line.floors[:2]:
        change = wrapped(line, operation, operation.operands[0], f".clamp(min=1 + {floor})", f"max({{}}, 1 + {floor})")
        yield f"keep the operand of acosh above 1 by {floor}", change


@rule("div true_divide divide addcdiv reciprocal", "mul nonfinite")
def divisor(line, operation):
    """Keep a divisor away from zero: of counts at 1, of magnitudes above zero, of others with their sign."""
    position = {"addcdiv": 2, "reciprocal": 0}.get(operation.name, 1)
    if position >= len(operation.operands):
        return
    node, source = operation.operands[position], line.source
    start, end, text = source.operand(node)
    plain = source.code(node)
    if literal(node) not in (None, 0.0):
        return
    small = [(f"{text}.clamp(min={floor})", floor) for floor in line.floors]
    signed = [(f"torch.where({text}.abs() < {floor}, {floor}, {text})", floor) for floor in line.floors]
    numbers = [(f"max({plain}, {floor})", floor) for floor in ("1", line.floors[0])]
    counts = [(f"{text}.clamp(min=1)", "1")]
    made = source.resolved(node)
    whole = isinstance(made, ast.Call) and getattr(made.func, "id", "") in ("int", "len")
    counted = whole or any(word in plain for word in ("len", "count", "num", "sum", "size", "shape", "total"))
    if not counted:
        numbers = numbers[::-1]
    # One of which nothing is known, as in a backward pass by hand, may be far below 1 where it is sound.
    tensors = [*counts, *small] if counted or line.divisor_whole else [*small, *counts]
    positive = [*counts, *small] if line.divisor_whole else [*small, *counts]
    choices = {True: [*positive, *numbers], False: [*signed, *small, *numbers]}
    choices[None] = [*numbers[:1], *tensors, *numbers[1:], *signed]
    raised = at_least(line, operation, node, line.floors[0])
    if raised and (raised[0].start, raised[0].end) != (start, end) and line.divisor_positive is not False:
        yield f"keep the divisor at {line.floors[0]} or above", raised
    for after, floor in choices[line.divisor_positive]:
        bound = f"at least {floor} from zero" if "where" in after else f"at {floor} or above"
        yield f"keep the divisor {bound}", [Edit(start, end, after)]


@rule("pow float_power", "sqrt rsqrt reciprocal")
def power(line, operation):
    """Keep the base of a broken or negative power above zero."""
    exponent = exponent_of(operation)
    if exponent is None or exponent < 1 or exponent != int(exponent):
        first: tuple[str, ...] = ()
        if line.of_numbers and exponent is not None:  # a negative power of a plain number is mostly that of a count
            first = ("0.0",) if exponent > 0 else ("1",)
        for floor in (*first, *line.floors):
            yield (
                f"keep the base of the power at {floor} or above",
                at_least(line, operation, operation.operands[0], floor),
            )


@rule("half bfloat16", "mul add matmul mm bmm einsum sum exp pow div")
def cast_to_half(line, operation):
    """Leave out the casts to 16 bit of a statement."""
    yield "compute in float32, without the cast to 16 bit", without_casts(line.source, line.statement)


@rule("mul multiply")
def product(line, operation):
    """Bound a product that overflows."""
    if isinstance(operation.node, ast.BinOp) and not operation.number:
        for limit in ("1e3",) if line.half else ("1e4", "1e8"):
            start, end, text = line.source.operand(operation.node)
            yield f"bound the product at {limit}", [Edit(start, end, f"{text}.clamp(-{limit}, {limit})")]


@rule("exp expm1 exp2 sinh cosh", "sum div mul log log1p")
def exponential(line, operation):
    """Use softmax, logsumexp or softplus, take the largest exponent out, or bound the exponent."""
    source, name = line.source, operation.name
    if not operation.number:
        if name == "exp":
            yield from stable_softmax(source, operation)
        for node in ast.walk(source.function(operation.node)):
            later = source.operation(node)
            if later is not None and later.name in ("log", "log1p"):
                yield from stable_logarithms(source, later, of=operation.node)
        if name == "exp":
            yield from shifted_exponential(source, operation)
    for limit in ("10", "5") if line.half else ("80", "20", "5"):
        bound = f".clamp({'-' + limit + ', ' if name in ('sinh', 'cosh') else 'max='}{limit})"
        change = wrapped(line, operation, operation.operands[0], bound, f"min({{}}, {limit})")
        yield f"bound the operand of {name} at {limit}", change


@rule("i0 i1", "special_i0 special_i1 log div")
def bessel(line, operation):
    """Use the Bessel functions that are scaled by an exponential, or bound what they read."""
    yield from scaled_bessel(line.source, operation)
    for limit in ("80", "10"):
        words = f"bound the operand of {operation.name} at {limit}"
        yield words, wrapped(line, operation, operation.operands[0], f".clamp(-{limit}, {limit})")


@rule("softmax log_softmax logsumexp cross_entropy scaled_dot_product_attention max amax", "sub mul exp div")
def masked_scores(line, operation):
    """Write a large finite number in the place of the infinities of a mask."""
    yield from replaced_mask(line.source, operation, line.statement)


def finite_constants(line: Line) -> Iterator[Change]:
    """Write large finite numbers in the place of infinities of the statement."""
    for scope in (line.statement, line.source.function(line.statement)):
        places = line.source.infinities(scope)
        if places:
            edits = [line.source.replaced(node, "1e4" if value > 0 else "-1e4") for node, value in places]
            yield "write a large finite number in the place of the infinite one", edits


@rule("std var", "std_mean var_mean sqrt")
def deviation(line, operation):
    """Take the root of a variance that has a floor, and divide by N so that one value has a variance."""
    source, call = line.source, operation.node
    options = {**operation.keywords}
    correction = options.get("correction", options.get("unbiased"))
    if correction is not None:
        whole = [source.replaced(correction, "False" if "unbiased" in options else "0")]
    else:
        end = source.span(call)[1] - 1
        empty = source.text[:end].rstrip().endswith("(")
        whole = [Edit(end, end, "correction=0" if empty else ", correction=0")]
    floors = []
    if operation.name == "std":
        _, end = source.span(call.func)
        name = Edit(end - len(call.func.attr), end, "var") if isinstance(call.func, ast.Attribute) else None
        after = source.span(call)[1]
        floors = [(f, [name, Edit(after, after, f".clamp(min={f}).sqrt()")]) for f in line.floors] if name else []
    for floor, edits in floors:
        yield f"take the root of the variance, kept at {floor} or above", edits
    yield from deviation_of_one(line, operation)
    yield f"use the biased {operation.name} (correction=0)", whole
    for floor, edits in floors:
        yield f"take the root of the biased variance, kept at {floor} or above", [*edits, *whole]


def deviation_of_one(line: Line, operation: Operation) -> Iterator[Change]:
    """Take the deviation of a single value, or of none, as 0."""
    source = line.source
    text = source.operand(operation.operands[0])[2]
    dim = operation.keywords.get("dim", operation.operands[1] if len(operation.operands) > 1 else None)
    given = [] if dim is None else [f"dim={source.code(dim)}"]
    given += [f"keepdim={source.code(v)}" for k, v in operation.keywords.items() if k == "keepdim"]
    if len(text) <= LONGEST:
        count = f"{text}.numel()" if dim is None else f"{text}.shape[{source.code(dim)}]"
        start, end = source.span(operation.node)
        choice = f"({source.text[start:end]} if {count} > 1 else {text}.sum({', '.join(given)}) * 0.0)"
        yield f"take the {operation.name} of a single value as 0", [Edit(start, end, choice)]


@rule("std_mean")
def deviation_and_mean(line, operation):
    """Take the root of a variance that has a floor, on a line of its own."""
    source, statement = line.source, line.statement
    targets = getattr(statement, "targets", None)
    if not targets or len(getattr(targets[0], "elts", ())) != 2 or statement.value is not operation.node:
        return
    name = source.code(targets[0].elts[0])
    _, end = source.span(operation.node.func)
    indent = " " * statement.col_offset
    finish = source.span(statement)[1]
    for floor in line.floors:
        edits = [Edit(end - len("std_mean"), end, "var_mean")]
        edits.append(Edit(finish, finish, f"\n{indent}{name} = {name}.clamp(min={floor}).sqrt()"))
        yield f"take the root of the variance, kept at {floor} or above", edits


EPS_CALLS = "normalize layer_norm batch_norm group_norm instance_norm rms_norm cosine_similarity pairwise_distance"


@rule(EPS_CALLS, "div native_layer_norm native_batch_norm native_group_norm rsqrt linalg_vector_norm")
def small_eps(line, operation):
    """Give a normalisation an eps that is not vanishing."""
    eps = operation.keywords.get("eps")
    if eps is not None and (literal(eps) is None or literal(eps) < 1e-6):
        for floor in line.floors[:1]:
            yield f"give {operation.name} an eps of {floor}", [line.source.replaced(eps, floor)]


LAYERS = re.compile(r"(Batch|Group|Instance|Layer|RMS)Norm\w*$")
NORMS = re.compile(r"(batch|group|instance|layer|rms)_norm|rsqrt")


def layers_with_small_eps(source: Source, record) -> Iterator[Change]:
    """Give a layer that normalises an eps that is not vanishing, where it is made."""
    for node in ast.walk(source.tree) if NORMS.search(record.op_name) else ():
        operation = source.operation(node)
        eps = operation.keywords.get("eps") if operation is not None and LAYERS.search(operation.name) else None
        if eps is not None and literal(eps) is not None and literal(eps) < 1e-6:
            yield f"give {operation.name} an eps of 1e-5", [source.replaced(eps, "1e-5")]


@rule("mean nanmean", "div")
def mean_of_empty(line, operation):
    """Divide a sum by a count of at least one."""
    source, node = line.source, operation.node
    if operation.number or not operation.operands:
        return
    text = source.operand(operation.operands[0])[2]
    dim = operation.keywords.get("dim", operation.operands[1] if len(operation.operands) > 1 else None)
    if dim is None:
        yield (
            "divide the sum by a count of at least 1",
            [source.replaced(node, f"{text}.sum() / max({text}.numel(), 1)")],
        )
        return
    _, end = source.span(node.func)
    if isinstance(node.func, ast.Attribute):
        width = len(node.func.attr)
        count = f" / max({text}.shape[{source.code(dim)}], 1)"
        after = source.span(node)[1]
        yield "divide the sum by a count of at least 1", [Edit(end - width, end, "sum"), Edit(after, after, count)]


@rule("cross_entropy nll_loss", "nll_loss_forward nll_loss nll_loss2d_forward div cross_entropy_loss")
def loss_over_nothing(line, operation):
    """Divide the sum of losses by a count of at least one, and keep class weights above zero."""
    source, node = line.source, operation.node
    weight = operation.keywords.get("weight")
    if weight is not None:
        start, end, text = source.operand(weight)
        yield "keep the class weights above zero", [Edit(start, end, f"{text}.clamp(min={line.floors[0]})")]
    if len(operation.operands) > 1 and "reduction" not in operation.keywords:
        ignored = operation.keywords.get("ignore_index")
        count = (
            f"({source.code(operation.operands[1])} != {source.code(ignored) if ignored else -100}).sum().clamp(min=1)"
        )
        start, end = source.span(node)
        change = f'{source.text[start : end - 1].rstrip().rstrip(",")}, reduction="sum") / {count}'
        yield "divide the sum of the losses by a count of at least 1", [Edit(start, end, change)]


@rule("atan2 arctan2 hypot")
def away_from_origin(line, operation):
    """Keep the second operand away from zero, where both being zero has no slope."""
    for floor in line.floors[:2] if len(operation.operands) > 1 else ():
        start, end, text = line.source.operand(operation.operands[1])
        after = f"torch.where({text}.abs() < {floor}, {floor}, {text})"
        yield f"keep the second operand of {operation.name} at least {floor} from zero", [Edit(start, end, after)]


@rule("angle")
def angle_of_zero(line, operation):
    """Give zero a small real part, for its angle has no slope."""
    start, end, text = line.source.operand(operation.operands[0])
    yield "give a number that is zero a small real part", [Edit(start, end, f"torch.where({text} == 0, 1e-6, {text})")]


@rule("norm vector_norm", "linalg_vector_norm div sqrt pow")
def norm_of_zero(line, operation):
    """Take the root of a sum of squares that has a floor."""
    source, node = line.source, operation.node
    p = operation.keywords.get("p", operation.keywords.get("ord"))
    if not operation.operands or (p is not None and literal(p) != 2) or operation.number:
        return
    text = source.operand(operation.operands[0])[2]
    given = [source.code(n) for n in operation.operands[1:] if literal(n) != 2 or operation.name != "norm"]
    given += [f"{k}={source.code(v)}" for k, v in operation.keywords.items() if k not in ("p", "ord")]
    for floor in ("1e-12", "1e-6"):
        change = f"{text}.square().sum({', '.join(given)}).clamp(min={floor}).sqrt()"
        yield f"take the root of a sum of squares, kept at {floor} or above", [source.replaced(node, change)]


@rule("logit")
def bounded_logit(line, operation):
    """Give logit an eps."""
    end = line.source.span(operation.node)[1] - 1
    yield "give logit an eps of 1e-6", [Edit(end, end, ", eps=1e-6" if not operation.method else "1e-6")]


@rule("masked_fill where full full_like new_full fill", "scalar_tensor masked_fill copy")
def number_of_the_type(line, operation):
    """Write the lowest number of the tensor's own type in the place of one that its type does not hold."""
    for node in operation.operands[1:]:
        value = literal(node)
        if value is not None and 65504 < abs(value) < math.inf and operation.method:
            end = "min" if value < 0 else "max"
            text = f"torch.finfo({line.source.operand(operation.operands[0])[2]}.dtype).{end}"
            yield "write the lowest number of its own type", [line.source.replaced(node, text)]
            yield "write a number that 16 bit hold", [line.source.replaced(node, "-1e4" if value < 0 else "1e4")]


@rule("ctc_loss", "ctc_loss")
def too_few_frames(line, operation):
    """Leave out rows that have fewer frames than labels."""
    if "zero_infinity" not in operation.keywords:
        end = line.source.span(operation.node)[1] - 1
        yield "leave out rows with fewer frames than labels (zero_infinity)", [Edit(end, end, ", zero_infinity=True")]
