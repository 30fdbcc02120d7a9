"""The house stays as it was built: which room imports from which, what stands at the root, how long a function is."""

import ast

import house
import pytest

MODULES = house.modules_of()


def test_a_room_imports_from_rooms_below_it_only():
    wrong = []
    for a, b in house.imports_of():
        above, below = house.room_of(a), house.room_of(b)
        if above != below and house.level_of(above) >= house.level_of(below):
            wrong.append(f"{a} imports {b}")
    assert not wrong, wrong


@pytest.mark.parametrize("room", sorted({house.room_of(name) for name in MODULES}))
def test_no_imports_run_in_a_circle_within_a_room(room):
    below = {}
    for a, b in house.imports_of():
        if house.room_of(a) == house.room_of(b) == room:
            below.setdefault(a, []).append(b)
    way, done = [], set()

    def visit(module):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        way.append(module)
        for other in below.get(module, ()):
            visit(other)
        done.add(way.pop())

    for module in below:
        visit(module)


def test_the_root_holds_the_commands_and_what_users_were_given():
    known = {name for names in house.LEVELS.values() for name in names}
    assert {path.stem for path in house.ROOT.glob("*.py")} <= known
    assert len(list(house.ROOT.glob("*.py"))) == 21, "a helper belongs into a room"


def test_no_function_is_longer_than_a_screen():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.relative_to(house.ROOT)}:{node.lineno}: {node.name} has {length} lines"
