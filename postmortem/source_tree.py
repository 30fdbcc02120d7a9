"""A source file as text and syntax tree: the operations of one line, and edits of them."""

import ast
import functools
import keyword
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMESPACES = {"torch", "F", "functional", "linalg", "special", "fft", "nn"}
NUMBER_NAMESPACES = {"math", "np", "numpy"}
OPERATORS = {ast.Div: "div", ast.Pow: "pow", ast.Mult: "mul"}
ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript)
LARGEST = 1e30  # a number of this size is written for an infinite one
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Edit:
    """Characters ``start`` to ``end`` of a file become ``text``."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Operation:
    """A call or an operator in the code: its name without a trailing underscore, its operands, its keywords.

    ``number``: it computes with plain numbers, as math.sqrt does. ``method``: the first operand is the object.
    """

    name: str
    operands: tuple
    keywords: dict
    node: Any
    number: bool = False
    method: bool = False


class Source:
    """The text of a Python file, its tree, and where its nodes are."""

    def __init__(self, text: str):
        self.text = text
        self.tree = ast.parse(text)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    @classmethod
    def of(cls, path) -> "Source":
        """Read a file."""
        return cls(Path(path).read_text(encoding="utf-8"))

    @functools.cached_property
    def lines(self) -> list[tuple[int, str]]:
        """(number of its first character, text) of each line."""
        found, start = [], 0
        for line in self.text.splitlines(keepends=True):
            found.append((start, line))
            start += len(line)
        return found

    def offset(self, line: int, column: int) -> int:
        """The character at a line and a column, which the tree counts in bytes of UTF-8."""
        start, text = self.lines[line - 1]
        return start + len(text.encode()[:column].decode())

    def span(self, node) -> tuple[int, int]:
        """The first character of a node and the one after its last."""
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def code(self, node) -> str:
        """The text of a node."""
        start, end = self.span(node)
        return self.text[start:end]

    def operand(self, node) -> tuple[int, int, str]:
        """The span and text of a node to which a method call can be appended: in parentheses if it needs them."""
        start, end = self.span(node)
        if isinstance(node, ATOMS) or (isinstance(node, ast.Constant) and "." in self.text[start:end]):
            return start, end, self.text[start:end]
        before, after = self.text[:start].rstrip(), self.text[end:].lstrip()
        if before.endswith("(") and after.startswith(")"):
            word = re.search(r"[\w)\]]+$", before[:-1].rstrip())
            if word is None or keyword.iskeyword(word[0]):  # not the parentheses of a call
                start, end = len(before) - 1, len(self.text) - len(after) + 1
                return start, end, self.text[start:end]
        return start, end, f"({self.text[start:end]})"

    def replaced(self, node, text: str) -> Edit:
        """The edit that writes a text in the place of a node."""
        return Edit(*self.span(node), text)

    def edited(self, edits) -> str:
        """The text with edits that do not overlap."""
        text = self.text
        for edit in sorted(edits, key=lambda e: e.start, reverse=True):
            text = text[: edit.start] + edit.text + text[edit.end :]
        return text

    def statement(self, line: int) -> ast.stmt | None:
        """The innermost statement at a line."""
        around = [n for n in ast.walk(self.tree) if isinstance(n, ast.stmt) and n.lineno <= line <= n.end_lineno]
        return min(around, key=lambda n: n.end_lineno - n.lineno, default=None)

    def function(self, node):
        """The innermost function around a node, or the module."""
        while node in self.parents and not isinstance(node, SCOPES[:2]):
            node = self.parents[node]
        return node

    def class_of(self, node):
        """The innermost class around a node; None if there is none."""
        while node is not None and not isinstance(node, ast.ClassDef):
            node = self.parents.get(node)
        return node

    def operations(self, statement) -> list[Operation]:
        """The operations of a statement, without those of statements inside it."""
        found, queue = [], [statement]
        while queue:
            node = queue.pop(0)
            operation = self.operation(node)
            found += [operation] if operation else []
            queue += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
        return found

    def operation(self, node) -> Operation | None:
        """A node as an operation; None if it is none."""
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
            operands = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
            return Operation(OPERATORS[type(node.op)], operands, {}, node)
        if not isinstance(node, ast.Call):
            return None
        keywords = {given.arg: given.value for given in node.keywords if given.arg}
        function = node.func
        if isinstance(function, ast.Name):
            return Operation(function.id, tuple(node.args), keywords, node)
        if not isinstance(function, ast.Attribute):
            return None
        name = function.attr if function.attr.endswith("__") else function.attr.rstrip("_")
        base = getattr(function.value, "attr", getattr(function.value, "id", ""))
        if base in NAMESPACES | NUMBER_NAMESPACES and not isinstance(function.value, ast.Call):
            return Operation(name, tuple(node.args), keywords, node, base in NUMBER_NAMESPACES)
        return Operation(name, (function.value, *node.args), keywords, node, method=True)

    def resolved(self, node):
        """The expression that a name stands for, if its function assigns it once; else the node."""
        if not isinstance(node, ast.Name):
            return node
        inside = ast.walk(self.function(node))
        values = [
            n.value
            for n in inside
            if isinstance(n, (ast.Assign, ast.AnnAssign, ast.AugAssign))
            for target in (n.targets if isinstance(n, ast.Assign) else [n.target])
            for name in ast.walk(target)
            if isinstance(name, ast.Name) and name.id == node.id
        ]
        return values[0] if len(values) == 1 and values[0] is not None else node

    def infinities(self, inside) -> list[tuple[ast.AST, float]]:
        """(node, value) of each number that is written as infinite: float("-inf"), torch.inf, -math.inf.

        The extremes of a type, as torch.finfo(x.dtype).min, count too: two of them add up to an infinity.
        """
        found = []
        for node in ast.walk(inside):
            value = mask_of(node)
            if value is not None and literal(self.parents.get(node)) is None:
                found.append((node, value))
        return found


def mask_of(node) -> float | None:
    """Infinity with its sign for an expression that writes one, or the end of a type's range; None for others."""
    value = literal(node)
    if value is not None:
        return math.copysign(math.inf, value) if abs(value) >= LARGEST else None
    if isinstance(node, ast.Attribute) and node.attr in ("min", "max") and isinstance(node.value, ast.Call):
        function = node.value.func
        if getattr(function, "attr", getattr(function, "id", "")) == "finfo":
            return math.inf if node.attr == "max" else -math.inf
    return None


def literal(node) -> float | None:
    """The number that an expression writes, None if it is no plain number."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = literal(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Attribute) and node.attr in ("inf", "nan"):
        return math.inf if node.attr == "inf" else math.nan
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "float" and len(node.args) == 1:
        word = getattr(node.args[0], "value", None)
        try:
            return float(word) if isinstance(word, str) else None
        except ValueError:
            return None
    return None
