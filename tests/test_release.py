"""What a newcomer runs: the README's words, the make targets, a clean checkout."""

import re
import subprocess
from pathlib import Path

from programs import ROOT

from config import KEYS
from settings import plugins

# docs/add_a_model.md has the reader write this file and set its key; tests/settings/test_drop_in.py does so.
EXAMPLE_FILE, EXAMPLE_FLAG = "models/SmallTDNN.py", "width"
FOLDERS = (
    "benchmarks|configs|corpus|docs|exporting|loss|models|optimizer|postmortem|preflight|preparation|scheduler|scoring"
    "|settings|storage|tests|training|web"
)


def test_every_file_the_documents_name_exists():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in pages}
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
        for name in re.findall(rf"`((?:{FOLDERS})/[\w./]+)`", page.read_text()):
            exists = (ROOT / name).exists() or Path(name).stem.lower() == "x" or name == EXAMPLE_FILE
            assert exists, f"{page.name}: {name}"


def test_every_configuration_is_in_the_readme_and_every_flag_exists():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.name in readme, path.name
    folders = plugins.CHOSEN_BY
    known = {*KEYS, "nproc_per_node", "print_config", EXAMPLE_FLAG}
    known |= {k for f in folders for name in plugins.available(f) for k in plugins.declaration(f, name).keys}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in page.read_text().splitlines():
            if "trainSpeakerNet.py" in line:
                for flag in re.findall(r"--(\w+)", line):
                    assert flag in known, f"{page.name}: --{flag}"


def test_size_and_style_limits():
    for path in ROOT.rglob("*.py"):
        if any(part.startswith((".venv", "build")) for part in path.relative_to(ROOT).parts):
            continue
        assert len(path.read_text().splitlines()) <= 500, path


def test_importing_the_modules_prints_nothing_and_parses_nothing():
    modules = [p.stem for p in ROOT.glob("*.py")]
    code = f"import sys; sys.argv = ['x', '--nonsense']; import {', '.join(modules)}"
    import sys

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_usage_errors_come_before_torch_is_loaded():
    import sys

    code = (
        "import sys, trainSpeakerNet; status = trainSpeakerNet.main(['--config', 'configs/demo.yaml', '--lr', 'x']);"
        " sys.exit(status if 'torch' not in sys.modules else 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == "command line: --lr: expected a number, got 'x'\n"
