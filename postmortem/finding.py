"""The form of a diagnosis."""

from dataclasses import dataclass, field


@dataclass
class Finding:
    """A diagnosis: cause (a class of DESIGN 3.6), short id, a sentence, the place, what speaks for it."""

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
    lever: str | None = None  # the configuration key an optimizer fault hangs on
