"""The form of a diagnosis."""

from dataclasses import dataclass, field

# Operation -> short id of what went wrong with it, by what it did to its operand.
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
    """A diagnosis: cause (of those in docs/nan_debugging.md), short id, a sentence, the place, what speaks for it."""

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
    setting: str | None = None  # the configuration key an optimizer fault hangs on


def detail_of(record) -> str:
    """Short id of what happened at an operation."""
    names = [record.op, record.node.removesuffix("0").removesuffix("Backward").lower()]
    if record.constant:
        return "nonfinite_constant"
    if not record.nan and not record.infinite:
        return "steep_gradient"
    return next((DETAILS[n] for n in names[::-1] if n in DETAILS), "overflow" if not record.nan else "nonfinite")
