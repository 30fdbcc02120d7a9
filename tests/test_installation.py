"""What is installed: ranges, locks, and a package whose inference needs none of the extras."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from programs import ROOT

from storage.files import save_atomically

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = ("tensorboard", "matplotlib", "torchaudio", "fastapi", "uvicorn", "python_multipart", "onnx", "onnxruntime")


def requirements(file):
    """{name: [requirement]} of a file; what it includes by ``-r`` is left out."""
    found = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if text and not text.startswith("-"):
            found.setdefault(canonicalize_name(Requirement(text).name), []).append(Requirement(text))
    return found


def ranges(lines):
    return {canonicalize_name(Requirement(line).name): Requirement(line).specifier for line in lines}


def test_requirements_are_those_of_the_package():
    extras = PROJECT["project"]["optional-dependencies"]
    main = ranges(PROJECT["project"]["dependencies"] + extras["train"] + extras["serve"])
    more = ranges(extras["export"] + extras["webdataset"] + extras["dev"])
    del more["speaker-recognition-trainer"]  # with all of its extras
    for file, expected in (("requirements.txt", main), ("requirements-dev.txt", more)):
        assert {name: both[0].specifier for name, both in requirements(file).items()} == expected, file


@pytest.mark.parametrize("lock, files", [("", [""]), ("-dev", ["", "-dev"])])
def test_a_lock_names_every_package_at_one_exact_version_of_the_ranges(lock, files):
    locked = requirements(f"requirements{lock}.lock")
    for file in files:
        for name, (wanted, *_) in requirements(f"requirements{file}.txt").items():
            assert name in locked, f"make lock: {name} is missing"
            for found in locked[name]:
                version = str(found.specifier).removeprefix("==")
                assert wanted.specifier.contains(version), f"make lock: {found}, but {file}: {wanted}"
    for name, choices in locked.items():
        assert all(re.fullmatch(r"==[^*,]+", str(choice.specifier)) for choice in choices), name
        for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
            here = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
            fitting = [choice for choice in choices if choice.marker is None or choice.marker.evaluate(here)]
            assert len(fitting) <= 1, f"{name} on Python {python}: {fitting}"
        assert not name.startswith(("nvidia", "cuda", "triton")), f"{name}: torch's wheel asks for its own"
    for name in requirements("requirements.lock"):
        assert locked[name] == requirements("requirements.lock")[name], f"the locks differ in {name}"


def test_every_module_is_in_the_package(tmp_path):
    """The wheel that pip would install, built from a copy (the build writes into its source)."""
    skipped = shutil.ignore_patterns(".*", "tests", "benchmarks", "docs", "data", "exps", "build", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=skipped)
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [path for path in source.rglob("*") if path.is_file() and "build" not in path.relative_to(source).parts]
    files = {path.relative_to(source).as_posix() for path in files if "egg-info" not in str(path)}
    loose = {name for name in files if "/" not in name and not name.endswith(".py")}  # README, Makefile, requirements
    assert packed == {name for name in files - loose if "__pycache__" not in name}


def test_every_command_of_the_package_is_there():
    for command, place in PROJECT["project"]["scripts"].items():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), command


CALLS = """
import contextlib, importlib, io, json, sys
missing, calls = json.loads(sys.stdin.read())
sys.modules.update(dict.fromkeys(missing))  # import one, and it is not there
results = []
class Captured(io.StringIO):
    def fileno(self):
        return 2
for module, words, *_ in calls:
    sys.argv = [f"{module}.py", *words]
    said, wrong = Captured(), Captured()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        status = importlib.import_module(module).command()
    results.append([module, status, said.getvalue(), wrong.getvalue()])
print(json.dumps(results))
"""


def call_without_extras(calls):
    words, given = [sys.executable, "-c", CALLS], json.dumps([EXTRAS, calls])
    done = subprocess.run(words, input=given, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_is_used_without_tensorboard_matplotlib_and_fastapi(settings, tools, data, tmp_path, write):
    model = tmp_path / "model_best.model"
    save_atomically(tools.build(settings).state.capture(), model)
    with_model, store = ["--initial_model", str(model)], ["--store", str(tmp_path / "s.npz")]
    a, b = sorted(map(str, (data / "wav").rglob("*.flac")))[:2]
    config, trials = write({**settings, "picture_format": "png"}), str(data / "trials.txt")
    no_pictures = ["--config", config, "--picture_format", "none", "--eval", *with_model]
    used = [
        ("embed", ["--wav", a, b, "--out", str(tmp_path / "e.ark"), *with_model]),
        ("verify", [a, b, *with_model]),
        ("enroll", ["ann", a, *store, *with_model]),
        ("identify", [b, *store, *with_model]),
        ("score", ["--trials", trials, "--root", str(data / "wav"), *with_model]),
        ("trainSpeakerNet", no_pictures),
    ]
    refused = [
        ("trainSpeakerNet", ["--config", config], "matplotlib tensorboard"),
        ("trainSpeakerNet", ["--config", config, "--eval", *with_model], "matplotlib"),
        ("serve", [*store, *with_model], "fastapi uvicorn python-multipart"),
        ("export", ["--out", str(tmp_path / "x.onnx"), *with_model], "onnx onnxruntime"),
        ("score", ["--trials", trials, "--embeddings", a, "--out", str(tmp_path / "out")], "matplotlib"),
        ("analyze_nan_debug", [str(tmp_path), "--html", str(tmp_path / "x.html")], "matplotlib"),
    ]
    results = call_without_extras([*used, *refused])
    for verb, status, said, wrong in results[: len(used)]:
        assert status == 0 and said, f"{verb}: {wrong}"
    for (_, _, packages), (verb, status, _, wrong) in zip(refused, results[len(used) :]):
        assert (status, wrong.count("\n")) == (2, 1), f"{verb}: {wrong}"
        assert wrong.endswith(f"pip install {packages}\n"), f"{verb}: {wrong}"
