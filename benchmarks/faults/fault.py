"""What a fault of the bench is: how it is put into a run, and what is true of it, all equivalent answers included."""

from collections.abc import Callable
from dataclasses import dataclass, field

MARKER = "# FAULT"  # ends each faulty source line of a plug-in; line numbers are found by searching for it


@dataclass(frozen=True)
class Place:
    """One right answer to "where": every field that is set must agree.

    ``files`` are paths below the data folder, and the analyser must name exactly these; of ``among`` it must name one
    or more, and no other. ``sample`` is the index in the file. ``code`` asks for a marked source line, ``ops`` for one
    of these operations. ``keys`` are configuration keys.
    """

    files: tuple = ()
    among: tuple = ()
    sample: int | None = None
    code: bool = False
    ops: tuple = ()
    modules: tuple = ()
    parameters: tuple = ()
    keys: tuple = ()
    rank: int | None = None
    named_rank: bool = False  # the rank in the dump's name: of the process that was dealt the file


@dataclass(frozen=True)
class Fix:
    """One true fix: an action, and what its change must satisfy.

    ``action`` 'exclude_file' needs one of ``files``, 'set' a ``key`` whose value passes ``good``, 'fix_code' a marked
    line, 'restore' nothing more.
    """

    action: str
    files: tuple = ()
    key: str = ""
    good: Callable = bool


@dataclass(frozen=True)
class Truth:
    """What is true of one fault: the dump's reason, the allowed causes, the places and the fixes.

    ``bit_equal`` asks the analyser for a replay that equals the run bit for bit.
    """

    reasons: tuple
    causes: tuple = ()
    places: tuple = ()
    fixes: tuple = ()
    bit_equal: bool = False


@dataclass(frozen=True)
class Stage:
    """One run of the trainer: what to change on the disk before it, and the exit status it must have."""

    prepare: Callable | None = None
    settings: dict = field(default_factory=dict)
    status: int = 0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, a control (no truth, nothing said) or a compound (several truths); entries keep the order of the fields.

    First how it is put into a run: ``plugins`` maps 'loss/x.py' to its source, ``after`` changes the disk between the
    run and the analysis, ``seconds`` is the longest time of a stage. Then what must come of it: the exit ``status``,
    patterns ``said`` of which each must be on the terminal, and ``forbidden`` ones that must not.
    """

    id: str
    title: str
    settings: dict = field(default_factory=dict)
    plugins: dict = field(default_factory=dict)
    prepare: Callable | None = None
    more: tuple = ()  # further stages after the first
    after: Callable | None = None
    processes: int = 1
    seconds: int = 120
    truths: tuple = ()
    status: int = 0
    said: tuple = ()
    forbidden: tuple = ()
    check: Callable | None = None  # workspace -> what is wrong, or None

    @property
    def is_control(self) -> bool:
        """Whether nothing may be blamed."""
        return self.id.startswith("C")


def marked(*ops: str) -> Place:
    """The marked line, and one of the operations if any is given."""
    return Place(code=True, ops=ops)


def exclude(*files) -> Fix:
    """Leave out a file."""
    return Fix("exclude_file", files=files)


def put(key: str, good: Callable) -> Fix:
    """Set a key to a value that passes."""
    return Fix("set", key=key, good=good)


CODE, RESTORE = Fix("fix_code"), Fix("restore")
FULL_PRECISION = (put("mixedprec", lambda v: not v), put("amp_dtype", lambda v: v == "bfloat16"))
