"""What a plug-in says of itself in its source, followed through classes, other names and imports; nothing is run."""

import ast
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UsageError

UNKNOWN = object()  # a default that is an expression, not a literal
MOST_STEPS = 8  # from a name to what it stands for
Function = (ast.FunctionDef, ast.Lambda)


@dataclass
class Declaration:
    """Keyword arguments of a plug-in with their defaults, and the constants of its class."""

    path: Path
    keys: dict = field(default_factory=dict)
    own: dict = field(default_factory=dict)  # those that the entry point itself names
    required: list = field(default_factory=list)
    constants: dict = field(default_factory=dict)


def parse(path: Path) -> ast.Module:
    """Parse a plug-in's source; UsageError names the line of a mistake. The tree is shared: it is to be read only."""
    try:
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as error:
        raise UsageError(f"{path.parent.name}/{path.name}:{error.lineno}: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        hint = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise UsageError(f"{path.parent.name}/{path.name}: cannot be read: {error}{hint}") from error


@functools.lru_cache(maxsize=256)  # a configuration asks for each plug-in several times
def _parsed(text: str, path: str) -> ast.Module:
    return ast.parse(text, filename=path)


class Source:
    """A file of the checkout ``root``: the statements that bind its top-level names, the first of each name."""

    def __init__(self, path: Path, root: Path):
        self.path, self.root = path, root
        self.names: dict[str, ast.stmt] = {}
        for node in statements(parse(path).body):
            for name in bound_by(node):
                self.names.setdefault(name, node)

    def defined(self) -> list[str]:
        """The names of the classes and functions of the file."""
        return [name for name, node in self.names.items() if isinstance(node, (ast.ClassDef, ast.FunctionDef))]

    def found(self, name: str, steps: int = MOST_STEPS) -> "Found | None":
        """The class or function that a top-level name stands for; None if it is of no file of the checkout.

        ``steps``: how many names to go on to; some stand for each other.
        """
        node = self.names.get(name)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            return Found(self, node)
        if not steps:
            return None
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            return self.meant(node.value, steps - 1)
        if isinstance(node, ast.ImportFrom):
            other = self.module(node.module or "", node.level)
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return other.found(original, steps - 1) if other is not None else None
        return None

    def meant(self, value, steps: int = MOST_STEPS) -> "Found | None":
        """The class or function that an expression is: a name, one of a module, a lambda, a ``partial`` of one."""
        if isinstance(value, ast.Lambda):
            return Found(self, value)
        if isinstance(value, ast.Name):
            return self.found(value.id, steps)
        if isinstance(value, ast.Attribute):
            module = self.module_of(value.value)
            return module.found(value.attr, steps) if module is not None else None
        if isinstance(value, ast.Call) and value.args and is_name(value.func, "partial"):
            base = self.meant(value.args[0], steps)
            fixed = {k.arg: literal(k.value) for k in value.keywords if k.arg}
            return base and Found(base.source, base.node, {**base.fixed, **fixed})
        return None

    def module_of(self, value) -> "Source | None":
        """The file that ``X`` of ``import models.X as X`` or ``from models import X`` means, or ``models.X``."""
        name = ast.unparse(value)
        node = self.names.get(name)
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            return None
        module = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        if isinstance(node, ast.Import):
            return self.module(module)
        return self.module(".".join(filter(None, (node.module, module))), node.level)

    def module(self, name: str, level: int = 0) -> "Source | None":
        """The file of a module of the checkout; ``level``: the dots in front of a relative import."""
        folder = self.path.parents[level - 1] if level else self.root
        path = folder.joinpath(*name.split(".")).with_suffix(".py") if name else folder
        if not path.is_file() or not path.is_relative_to(self.root) or path == self.path:
            return None
        return Source(path, self.root)


@dataclass
class Found:
    """A class or function, where it stands, and the arguments that a ``partial`` gives it."""

    source: Source
    node: Any
    fixed: dict = field(default_factory=dict)

    def bases(self) -> list["Found"]:
        """The classes of the checkout that a class derives from."""
        return [base for base in map(self.source.meant, getattr(self.node, "bases", ())) if base is not None]

    def function(self, depth: int = MOST_STEPS) -> "Found | None":
        """What is called: the function itself, the ``__init__`` of the class, or the one that it inherits."""
        if isinstance(self.node, Function):
            return self
        inner = next((n for n in self.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if inner is not None:
            return Found(self.source, inner, self.fixed)
        inherited = (base.function(depth - 1) for base in self.bases()) if depth else ()
        return next((Found(f.source, f.node, {**f.fixed, **self.fixed}) for f in inherited if f is not None), None)

    def constants(self, depth: int = MOST_STEPS) -> dict:
        """Class-level ``name = literal`` assignments, inherited ones too."""
        if not isinstance(self.node, ast.ClassDef):
            return {}
        found: dict = {}
        for base in reversed(self.bases() if depth else []):
            found |= base.constants(depth - 1)
        for statement in (s for s in self.node.body if isinstance(s, ast.Assign)):
            found |= dict.fromkeys(bound_by(statement), literal(statement.value))
        return found

    def keys(self, depth: int = MOST_STEPS) -> dict:
        """The keyword arguments {name: default} of what is called, and of what its ``**kwargs`` is handed on to."""
        called = self.function()
        if called is None:
            return {}
        keys = arguments(called.node)[0]
        keys = {name: called.fixed.get(name, default) for name, default in keys.items()}
        rest = called.node.args.kwarg.arg if called.node.args.kwarg else ""
        if not rest or not depth or not any(is_name(node, rest) for node in ast.walk(called.node)):
            return keys
        keys = {**read_from(called.node, rest), **keys}
        for inner in [*self.handed_to(called, rest), *self.beside(called)]:
            keys = {**inner.keys(depth - 1), **keys}
        return keys

    def handed_to(self, called: "Found", rest: str) -> list["Found"]:
        """What is called with ``**rest``, the ``__init__`` of base classes among it."""
        found: list[Found | None] = []
        for call in (node for node in ast.walk(called.node) if isinstance(node, ast.Call)):
            if any(k.arg is None and is_name(k.value, rest) for k in call.keywords):
                own = isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"
                found += self.bases() if own else [called.source.meant(call.func)]
        return [inner for inner in found if inner is not None]

    def beside(self, called: "Found") -> list["Found"]:
        """The other classes and functions of the file, in which ``kwargs`` may arrive by another way."""
        kinds = (ast.ClassDef, ast.FunctionDef)
        nodes = [n for n in called.source.names.values() if isinstance(n, kinds) and n not in (self.node, called.node)]
        return [Only(called.source, node) for node in nodes]


class Only(Found):
    """A class or function of which the arguments that it names itself count alone."""

    def keys(self, depth: int = 0) -> dict:
        """The keyword arguments {name: default}."""
        called = self.function()
        return arguments(called.node)[0] if called is not None else {}


def declaration_in(path: Path, entry: str, root: Path, leading: int = 0) -> Declaration | None:
    """What the file ``path`` of the checkout ``root`` says of its ``entry`` point; None if it does not define it.

    ``leading``: the arguments that are no keys, as the optimizer's parameters.
    """
    source = Source(path, root)
    if entry not in source.names:
        return None
    found = source.found(entry)
    if found is None:  # a class of a package: what it takes is known when it is called
        return Declaration(path)
    called, keys = found.function(), found.keys()
    named, required = arguments(called.node) if called is not None else ({}, [])
    for name in required[:leading]:
        keys.pop(name), named.pop(name)
    required = [name for name in required[leading:] if name not in called.fixed] if called is not None else []
    return Declaration(path, keys, {name: keys[name] for name in named}, required, found.constants())


def statements(body):
    """Statements, and in their place those inside of ``if``, ``try`` and ``with``."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            inner = [part for name in ("body", "handlers", "orelse", "finalbody") for part in getattr(node, name, ())]
            yield from statements(n for part in inner for n in (part.body if hasattr(part, "type") else [part]))
        else:
            yield node


def bound_by(node) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def arguments(function) -> tuple[dict, list[str]]:
    """({name: default}, [names without default]) of a function, without ``self``."""
    a = function.args
    positional = a.posonlyargs + a.args
    if positional and positional[0].arg == "self":
        positional = positional[1:]
    defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
    pairs = list(zip(positional, defaults)) + list(zip(a.kwonlyargs, a.kw_defaults))
    keys = {arg.arg: UNKNOWN if default is None else literal(default) for arg, default in pairs}
    return keys, [arg.arg for arg, default in pairs if default is None]


def read_from(function, rest: str) -> dict:
    """The keys {name: default} that a function reads from its ``**rest``: ``kwargs["x"]``, ``kwargs.get("x", 1)``."""
    found = {}
    for node in ast.walk(function):
        name, default = None, UNKNOWN
        if isinstance(node, ast.Subscript) and is_name(node.value, rest):
            name = literal(node.slice)
        method = node.func if isinstance(node, ast.Call) else None
        if isinstance(method, ast.Attribute) and is_name(method.value, rest) and method.attr in ("get", "pop"):
            name, default, *_ = [*map(literal, getattr(node, "args", ())), UNKNOWN, UNKNOWN]
        if isinstance(name, str):
            found[name] = default
    return found


def is_name(node, name: str) -> bool:
    """Whether an expression is this name, or this attribute of another name."""
    return getattr(node, "id", None) == name or (isinstance(node, ast.Attribute) and node.attr == name)


def literal(node):
    """The value of a literal, else UNKNOWN."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN
