"""Help, printed configurations and mistakes answer at once: nothing heavy is imported for them."""

import json
import subprocess
import sys

import pytest
import yaml
from programs import ROOT

VERBS = [path.stem for path in sorted(ROOT.glob("*.py")) if "__name__ ==" in path.read_text(encoding="utf-8")]
# torch takes seconds; scipy's parts and the others a second together, with a cold disk several.
HEAVY = "torch sklearn matplotlib tensorboard fastapi onnx onnxruntime torchaudio scipy.signal scipy.stats scipy.linalg"
# One process for all of them: each imports what it needs into its own namespace, and what is imported stays there.
WATCH = f"""
import contextlib, importlib, io, json, runpy, sys
found = {{}}
class Captured(io.StringIO):
    def fileno(self):
        return 2
for name, words in json.loads(sys.stdin.read()):
    sys.argv = [name + ".py", *words]
    output = Captured()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(name + ".py", run_name="__main__")
        except SystemExit as end:
            status = end.code
    heavy = [module for module in {HEAVY.split()!r} if module in sys.modules]
    found[" ".join([name, *words[-1:]])] = [status or 0, heavy, output.getvalue()]
print(json.dumps(found))
"""


def watch(calls):
    """Run command lines in one process: {call: [status, heavy modules imported by then, output]}."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH], input=json.dumps(calls), capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_and_mistakes_of_every_command_import_nothing_heavy():
    assert len(VERBS) >= 12
    found = watch([[name, [flag]] for name in VERBS for flag in ("--help", "--no_such_flag")])
    for call, (status, heavy, output) in found.items():
        assert heavy == [], f"{call} imports {heavy}"
        assert status == (0 if call.endswith("--help") else 2), f"{call}: {output}"
        if status:
            assert output and "Traceback" not in output, f"{call}: {output}"


@pytest.mark.parametrize("extra", [{}, {"model": "CAMPPlus", "features": "wespeaker", "n_mels": 80}])
def test_a_printed_configuration_imports_nothing_heavy(settings, write, extra):
    settings = {key: value for key, value in settings.items() if not extra or key not in ("channels", "aggregate")}
    file = write({**settings, **extra})
    ((status, heavy, output),) = watch([["trainSpeakerNet", ["--config", file, "--print_config"]]]).values()
    assert (status, heavy) == (0, []) and yaml.safe_load(output)["model"] == {**settings, **extra}["model"]
