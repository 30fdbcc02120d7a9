"""A type checker knows the keys of the table: `make lint` fails on a misspelt one in the code that it checks."""

import ast
import re
import subprocess
import sys

import pytest
from programs import ROOT

from config import KEYS, Config

CODE = """from config import Config

def count(config: Config) -> int: return config.nClasses + len(config.train_list)
def misspelt(config: Config) -> int: return config.nClases
def of_another_type(config: Config) -> str: return config.nClasses
"""


def test_mypy_refuses_a_misspelt_key_and_knows_the_type_of_a_key(tmp_path):
    pytest.importorskip("mypy")
    path = tmp_path / "uses_keys.py"
    path.write_text(CODE)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    misspelt, other_type, total = done.stdout.strip().splitlines()
    assert ':4: error: "Config" has no attribute "nClases"' in misspelt
    assert ":5: error: Incompatible return value type" in other_type
    assert total.startswith("Found 2 errors in 1 file")


def test_code_that_mypy_checks_says_what_a_configuration_is():
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    paths = [ROOT / name for name in mypy["files"]]
    files = [file for path in paths for file in ([path] if path.suffix else sorted(path.glob("*.py")))]
    excluded = re.compile("|".join(mypy.get("exclude", ["^$"])))
    files = [file for file in files if not excluded.search(file.relative_to(ROOT).as_posix())]
    assert ROOT / "config.py" in files and ROOT / "settings" / "checks.py" in files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg) and node.arg == "config":
                assert node.annotation is not None, f"{path.relative_to(ROOT)}:{node.lineno}: 'config' has no type"


def test_a_configuration_has_every_key_in_the_order_of_the_table_and_then_those_of_plug_ins():
    config = Config(channels=8, nOut=16)
    assert list(config.values()) == [*KEYS, "channels"]
    assert config.values() == {**{name: key.default for name, key in KEYS.items()}, "nOut": 16, "channels": 8}
    assert all(type(key.default) is key.type for key in KEYS.values())
