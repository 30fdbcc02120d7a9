"""The form of a diagnosis, and the sentences that describe an operation at fault."""

import math
from dataclasses import dataclass, field

LARGE = 1e9  # a finite operand of this size makes an overflow more likely than a singularity


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
    """Return the short id of what an operation did, from its name and the numbers that it read."""
    if record.refusal:
        return "refused"
    if record.wraps:
        return "integer_overflow"
    if record.reduces_masks:
        return "all_masked"
    if record.constant:
        return "nonfinite_constant"
    if not record.nan and not record.infinite:
        return "steep_gradient"
    name = next((n for n in (record.op_name, record.op.strip("_")) if n in SINGULAR), None)
    read = record.operands if not record.backward else []
    found = SINGULAR[name](read, record) if name else None
    return found or ("nonfinite" if record.nan else "overflow")


def _root(read, record):
    return "sqrt_of_negative" if read and read[0].smallest < 0 else "sqrt_at_zero"


def _logarithm(read, record):
    return "log_of_negative" if read and read[0].smallest < 0 else "log_at_zero"


def _factor_and_logarithm(read, record):
    return _logarithm(read[1:], record)


def _division(read, record):
    divisor = read[-1] if read and "reciprocal" in record.op_name else read[1] if len(read) > 1 else None
    if divisor is not None and not divisor.zeros and abs(divisor.nearest_to_zero) > 1e-30:
        return "overflow" if not record.nan else "nonfinite"
    return "divide_by_zero"


def _arc(read, record):
    outside = read and max(abs(read[0].smallest), abs(read[0].largest)) > 1
    return "acos_outside_one" if outside else "acos_at_one"


def _exponential(read, record):
    return "exp_overflow"


def _pole(read, record):
    return "at_a_pole"


def _softmax(read, record):
    return "softmax_of_minus_inf"


def _variance(read, record):
    if not record.nan or (read and max(abs(read[0].smallest), abs(read[0].largest)) > LARGE):
        return "overflow"
    return "variance_of_single_value" if not record.backward else "variance_of_a_constant"


def _power(read, record):
    if record.backward and record.op == "pow" and record.numbers and min(record.numbers) >= 0:
        return "overflow"  # the slope of a power above 1
    if read and max(abs(read[0].smallest), abs(read[0].largest)) > LARGE and not record.nan:
        return "overflow"
    return "power_of_negative" if read and read[0].smallest < 0 and record.nan else "power"


def _mean(read, record):
    return "mean_of_empty" if not read or read[0].count == 0 else None


# Operation -> what it did, from the ranges that it read.
SINGULAR = {
    **dict.fromkeys(("sqrt", "rsqrt"), _root),
    **dict.fromkeys(("log", "log2", "log10", "log1p"), _logarithm),
    "xlogy": _factor_and_logarithm,
    **dict.fromkeys(("div", "true_divide", "reciprocal"), _division),
    **dict.fromkeys(("acos", "asin", "arccos", "arcsin"), _arc),
    **dict.fromkeys(("exp", "expm1", "exp2", "sinh", "cosh"), _exponential),
    **dict.fromkeys(("digamma", "lgamma", "polygamma", "atanh", "erfinv", "logit"), _pole),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _variance),
    "pow": _power,
    "mean": _mean,
}


# Operation -> (which operand explains its result, which of its extremes, in words).
TELLING = {
    **dict.fromkeys(("sqrt", "rsqrt", "log", "log2", "log10", "log1p", "acosh"), (0, "smallest", "smallest input")),
    **dict.fromkeys(("exp", "exp2", "expm1"), (0, "largest", "largest input")),
    **dict.fromkeys(("sinh", "cosh"), (0, "farthest", "input farthest from 0")),
    **dict.fromkeys(("div", "true_divide"), (1, "nearest_to_zero", "divisor nearest to 0")),
    "reciprocal": (0, "nearest_to_zero", "input nearest to 0"),
    "xlogy": (1, "smallest", "smallest input of the logarithm"),
}
REASONS = {
    "all_masked": "the mask leaves no value of a row",
    "softmax_of_minus_inf": "every value of a row is -inf",
    "variance_of_single_value": "it takes the variance of a single value",
    "mean_of_empty": "it takes the mean of no values",
    "nonfinite_constant": "a number that enters here is NaN or Inf",
}
SLOPES = {
    "sqrt_at_zero": "the slope of sqrt at 0 is infinite",
    "log_at_zero": "the slope of log at 0 is infinite",
    "acos_at_one": "the slope of acos and asin at 1 and -1 is infinite",
    "divide_by_zero": "the divisor is 0 or close to it",
    "power": "the slope of a power below 1 is infinite at 0",
    "exp_overflow": "exp overflows in the forward pass, where what follows hides it: 0 times Inf",
    "at_a_pole": "what it reads is where the function itself is infinite",
    "variance_of_a_constant": "the slope of a deviation of equal values is infinite",
}


def result_of(record) -> str:
    """Describe the result of an operation at fault: 'sqrt gave NaN; its smallest input was -0.0092'."""
    kinds = " and ".join([*["NaN"] * record.nan, *["Inf"] * record.infinite])
    detail = detail_of(record)
    if record.refusal:
        said = record.refusal.rstrip(".")
        return f"{record.op_name} refuses what it reads: {said}" if record.op else said
    if record.wraps:
        return f"{record.op_name} leaves the range of {record.dtype}, and its result wraps around"
    if detail == "steep_gradient":
        return f"the gradient of {record.op_name} is so large that the gradient norm overflows"
    if record.backward:
        reason = f" ({SLOPES[detail]})" if detail in SLOPES else ""
        return f"the gradient of {record.op_name} is {kinds}{reason}; the forward pass is finite"
    reason = f": {REASONS[detail]}" if detail in REASONS else inputs_of(record)
    what = f"the cast to {record.dtype}" if record.op == "_to_copy" else record.op_name
    kept = f", which '{record.made}' holds from the start" if record.made else ""
    return f"{what} gave {kinds}{reason}{kept}"


# Operation -> the names of what it reads.
OPERANDS = {
    "addmm": ("bias", "input", "weight"),
    "div": ("dividend", "divisor"),
    "mul": ("first factor", "second factor"),
}


def inputs_of(record) -> str:
    """Describe the inputs that explain a result, as the end of a sentence; '' if they are not known."""
    read = record.operands
    if record.op_name == "div" and len(read) == 2 and record.nan and read[0].zeros and read[1].zeros:
        return "; 0 is divided by 0"
    if record.op_name == "div" and len(read) == 1 and not read[0].infinite:  # the other one is of whole numbers
        return "; 0 is divided by 0" if record.nan else "; the divisor is 0 or close to it"
    if record.op_name == "mul" and len(read) == 2 and record.nan and any(r.infinite for r in read):
        return "; 0 is multiplied by Inf"
    operand, extreme, words = TELLING.get(record.op_name, (0, "", ""))
    if words and operand < len(read) and math.isfinite(getattr(read[operand], extreme)):
        value = f"{getattr(read[operand], extreme):.4g}"
        return f"; its {words} was {record.described(read[operand], value)}"
    return f"; its {ranges_of(record)}" if read else ""


def ranges_of(record) -> str:
    """The ranges of what an operation read: 'input was 1 to 5', 'bias was 0 to 1, input 9 to 70, weight 20 to 20'."""
    names, ranges = OPERANDS.get(record.op_name, ()), [record.described(r) for r in record.operands]
    if len(names) == len(ranges) and names:
        return ", ".join(f"{name}{'' if i else ' was'} {r}" for i, (name, r) in enumerate(zip(names, ranges)))
    return f"{'input was' if len(ranges) == 1 else 'inputs were'} {' and '.join(ranges)}"


def first_result(record, source: str | None) -> str:
    """Name the operation with the first non-finite result, its type, line and inputs: a line of evidence."""
    firsts = {"steep_gradient": "largest gain of the gradient", "refused": "first operation that fails"}
    firsts["integer_overflow"] = "first whole number outside of its type"
    what = firsts.get(detail_of(record), "first NaN or Inf")
    operands = f", inputs {' and '.join(map(record.described, record.operands))}" if record.operands else ""
    if not record.op:
        return f"{what}: {record.refusal} at {source}"
    return f"{what}: {record.node or record.op} ({record.dtype}) at {source or 'an unknown line'}{operands}"
