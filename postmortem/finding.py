"""The form of a diagnosis, and the sentences that describe an operation at fault."""

import math
from dataclasses import dataclass, field

# Operation -> short id of its fault.
DETAILS = {
    **dict.fromkeys(("sqrt", "rsqrt"), "sqrt_at_zero"),
    **dict.fromkeys(("log", "log2", "log10", "log1p"), "log_at_zero"),
    **dict.fromkeys(("div", "reciprocal"), "divide_by_zero"),
    **dict.fromkeys(("acos", "asin", "arccos", "arcsin"), "acos_at_one"),
    **dict.fromkeys(("exp", "expm1", "sinh", "cosh"), "exp_overflow"),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax"), "softmax_of_minus_inf"),
    **dict.fromkeys(("var", "std", "var_mean"), "variance_of_one"),
    "pow": "power",
    "mean": "mean_of_nothing",
}


@dataclass
class Finding:
    """A diagnosis: cause (one of docs/nan_debugging.md), short id, a sentence, the place, the evidence."""

    cause: str
    detail: str
    summary: str
    evidence: list = field(default_factory=list)
    module: str | None = None
    op: str | None = None
    phase: str | None = None
    source: str | None = None
    parameter: str | None = None
    columns: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    files: list = field(default_factory=list)  # of {"path", "sample"}
    rank: int | None = None
    setting: str | None = None  # the configuration key that an optimizer fault depends on


def detail_of(record) -> str:
    """Return the short id of what an operation did."""
    names = [record.op, record.node.removesuffix("0").removesuffix("Backward").lower()]
    if record.constant:
        return "nonfinite_constant"
    if not record.nan and not record.infinite:
        return "steep_gradient"
    return next((DETAILS[n] for n in names[::-1] if n in DETAILS), "overflow" if not record.nan else "nonfinite")


# Operation -> (which operand explains its result, which of its extremes, in words).
TELLING = {
    **dict.fromkeys(("sqrt", "rsqrt", "log", "log2", "log10", "log1p", "acosh"), (0, "smallest", "smallest input")),
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), (0, "largest", "largest input")),
    **dict.fromkeys(("div", "true_divide"), (1, "nearest_to_zero", "divisor nearest to 0")),
    "reciprocal": (0, "nearest_to_zero", "input nearest to 0"),
}
REASONS = {
    "softmax_of_minus_inf": "every value of a row is -inf",
    "variance_of_one": "it takes the variance of a single value",
    "mean_of_nothing": "it takes the mean of no values",
    "nonfinite_constant": "a number in the code is NaN or Inf",
}
SLOPES = {
    "sqrt_at_zero": "the slope of sqrt at 0 is infinite",
    "log_at_zero": "the slope of log at 0 is infinite",
    "acos_at_one": "the slope of acos and asin at 1 and -1 is infinite",
    "divide_by_zero": "the divisor is 0 or close to it",
    "power": "the slope of a power below 1 is infinite at 0",
}


def result_of(record) -> str:
    """Describe the result of an operation at fault: 'sqrt gave NaN; its smallest input was -0.0092'."""
    kinds = " and ".join([*["NaN"] * record.nan, *["Inf"] * record.infinite])
    detail = detail_of(record)
    if detail == "steep_gradient":
        return f"the gradient of {record.op_name} is so large that the gradient norm overflows"
    if record.backward:
        reason = f" ({SLOPES[detail]})" if detail in SLOPES else ""
        return f"the gradient of {record.op_name} is {kinds}{reason}; the forward pass is finite"
    reason = f": {REASONS[detail]}" if detail in REASONS else inputs_of(record)
    return f"{record.op_name} gave {kinds}{reason}"


def inputs_of(record) -> str:
    """Describe the inputs that explain a result, as the end of a sentence; '' if they are not known."""
    operand, extreme, words = TELLING.get(record.op_name, (0, "", ""))
    if words and operand < len(record.operands) and math.isfinite(getattr(record.operands[operand], extreme)):
        return f"; its {words} was {getattr(record.operands[operand], extreme):.4g}"
    return f"; its inputs were {' and '.join(map(str, record.operands))}" if record.operands else ""


def first_result(record, source: str | None) -> str:
    """Name the operation with the first non-finite result, its type, line and inputs: a line of evidence."""
    what = "largest gain of the gradient" if detail_of(record) == "steep_gradient" else "first NaN or Inf"
    operands = f", inputs {' and '.join(map(str, record.operands))}" if record.operands else ""
    return f"{what}: {record.node or record.op} ({record.dtype}) at {source or 'an unknown line'}{operands}"


def plural(count: int, word: str) -> str:
    """'1 row', '2 rows'."""
    return f"{count} {word}{'' if count == 1 else 's'}"
