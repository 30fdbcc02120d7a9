"""Write a line of code so that its operation stays finite: the candidates, of which the replay tries each."""

import ast
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from postmortem.matrix_rules import RULES
from postmortem.probe import Record, Site
from postmortem.rules import Change, Line, Rule, finite_constants, layers_with_small_eps
from postmortem.source_tree import Edit, Operation, Source
from postmortem.stable_forms import boolean_masks, every_logarithm, without_casts

BELOW_ONE = {"float16": ("1e-3",), "bfloat16": ("3e-3",)}  # distances from 1 that these types can tell from 1
EXTREMES = {"float16": 6e4}  # an operand of this size is the end of its type's range
EXTREME = 1e38


def rewrites(text: str, number: int, record, of_numbers: bool = False) -> list[tuple[str, str]]:
    """(words, new text) of a file for each way to keep line ``number`` finite; likely ones first.

    ``record``: the probe's record of the operation that went wrong there. ``of_numbers``: as in a Line.
    """
    if not record.op and record.refusal and not of_numbers:  # of Python's own: plain numbers are likely
        as_numbers = rewrites(text, number, record, of_numbers=True)
        return distinct([*as_numbers, *rewrites(text, number, replace(record, refusal=""))])
    source = Source(text)
    statement = source.statement(number)
    if statement is None:
        return []
    half = record.dtype == "float16"
    divisors = record.operands[1:2] if record.op_name in ("div", "true_divide") else None
    positive = divisors[0].smallest >= 0 if divisors and not math.isnan(divisors[0].smallest) else None
    floors = ("1e-4", "1e-3") if half else ("1e-6", "1e-8", "1e-12")
    below_one = BELOW_ONE.get(record.dtype, Line.below_one)
    whole = divisors == [] or (bool(divisors) and is_count(divisors[0]))
    line = Line(source, statement, floors, half, below_one, of_numbers, positive, whole)
    found: list[tuple[tuple[bool, bool, float], str, str]] = []
    operations = source.operations(statement)
    for operation in operations:
        for entry in RULES:
            if operation.name in entry.names:
                matches = record.op_name in entry.faults or record.op in entry.faults
                here = operation.node.lineno <= number <= operation.node.end_lineno
                for place, (words, edits) in enumerate(entry.changes(line, operation)):
                    found.append(((not matches, not here, place), words, source.edited(edits)))
    for entry in RULES:
        matches = record.op_name in entry.faults or record.op in entry.faults
        for place, (words, edits) in enumerate(all_at_once(line, operations, entry)):
            found.append(((not matches, False, place + 0.5), words, source.edited(edits)))
    found += [((False, False, -2), words, source.edited(edits)) for words, edits in every_logarithm(source, operations)]
    masks = [change for operation in operations for change in boolean_masks(source, operation)]
    found += [((False, False, 0), words, source.edited(edits)) for words, edits in masks]
    if record.reduces_masks:
        found += [((False, False, -2), words, source.edited(edits)) for words, edits in nothing_as_zero(line, record)]
    if record.wraps:
        found += [((False, False, -2), words, source.edited(edits)) for words, edits in in_float(source, operations)]
    if record.dtype in BELOW_ONE:  # what the line reads was often cast lines before it
        edits = without_casts(source, statement) or without_casts(source, source.function(statement))
        found.append(((False, False, -1), "compute in float32, without the cast to 16 bit", source.edited(edits)))
    found += [
        ((False, False, -1), words, source.edited(edits)) for words, edits in layers_with_small_eps(source, record)
    ]
    if record.constant or any(parent.is_mask for parent in record.parents) or reads_extremes(record):
        for place, (words, edits) in enumerate(finite_constants(line)):
            found.append(((False, False, place), words, source.edited(edits)))
    found.sort(key=lambda entry: entry[0])
    unique = {after: words for _, words, after in reversed(found) if after != text}
    order = list(dict.fromkeys(after for _, _, after in found if after in unique))
    return [(unique[after], after) for after in order if compiles(after)]


def all_at_once(line: Line, operations: list[Operation], entry: Rule) -> Iterator[Change]:
    """The changes of a rule to all operations of a statement that it is for: one that is left fails on another step."""
    concerned = [operation for operation in operations if operation.name in entry.names]
    for changes in zip(*(entry.changes(line, operation) for operation in concerned)) if len(concerned) > 1 else ():
        edits = sorted({edit for _, edits in changes for edit in edits}, key=lambda edit: edit.start)
        if all(before.end <= after.start for before, after in itertools.pairwise(edits)):
            yield f"{changes[0][0]}, and likewise in the rest of the statement", edits


def is_count(divisor) -> bool:
    """Whether what is known of a divisor are whole numbers, as of a count."""
    known = (divisor.smallest, divisor.largest, divisor.nearest_to_zero)
    return divisor.largest >= 1 and all(math.isfinite(value) and value == int(value) for value in known)


def nothing_as_zero(line: Line, record) -> Iterator[Change]:
    """Take what a mask leaves nothing of as 0."""
    for operation in line.source.operations(line.statement):
        if operation.name == record.op_name:
            change = f"torch.nan_to_num({line.source.code(operation.node)}, neginf=0.0)"
            yield f"take the {operation.name} of nothing as 0", [line.source.replaced(operation.node, change)]


def in_float(source: Source, operations: list[Operation]) -> Iterator[Change]:
    """Compute with floating-point numbers what whole numbers cannot hold."""
    for operation in operations:
        if operation.name in ("mul", "pow", "square", "add", "sub", "mm", "matmul", "abs") and operation.operands:
            start, end, text = source.operand(operation.operands[0])
            yield f"compute {operation.name} with floating-point numbers", [Edit(start, end, f"{text}.float()")]


def reads_extremes(record) -> bool:
    """Whether an operation reads a number at the end of its type's range, as masks are made of."""
    limit = EXTREMES.get(record.dtype, EXTREME)
    return any(abs(operand.farthest) >= limit for operand in record.operands)


def rewrites_of_file(text: str) -> list[tuple[str, str]]:
    """(words, new text) for every line of a file, if it is not known which one is at fault."""
    lines = {node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)}
    unknown = Record("", "", Site(), False, True, False, [], 0, "float32")
    found = [
        (f"line {n}: {words}", after)
        for n in sorted(lines)
        for of_numbers in (False, True)
        for words, after in rewrites(text, n, unknown, of_numbers)
    ]
    return distinct(found)


def distinct(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Changes without those that give a text which another one gives too."""
    return list({after: (words, after) for words, after in found}.values())


def compiles(text: str) -> bool:
    """Whether a text is Python."""
    try:
        compile(text, "<rewritten>", "exec")
    except SyntaxError:
        return False
    return True
