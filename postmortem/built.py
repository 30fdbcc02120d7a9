"""Networks of loops that are not the trainer's: made by a function 'module:function' of the user's own code."""

import ast
import contextlib
import importlib
import importlib.util
import math
import os
import sys
from pathlib import Path

import torch
from torch import nn

from errors import ROOT, UsageError, first_line, is_installed
from settings.user_code import changed_since, is_product, source_hash
from utils import plain_names

EXPECTED = "(model, optimizer) or (model, optimizer, loss)"


class BuiltNetwork(nn.Module):
    """The user's model, and the loss if it is not a part of it, as the trainer's step takes them.

    (data, label) -> (loss, accuracy in %, NaN if it is not known). In names the model is ``__S__``, the loss ``__L__``.
    """

    def __init__(self, model: nn.Module, loss=None):
        super().__init__()
        self.__S__ = model
        self.__L__ = loss if isinstance(loss, nn.Module) else None
        self.loss_function = None if isinstance(loss, nn.Module) else loss

    @property
    def loss(self):
        """The loss, None if the model computes it."""
        return self.__L__ if self.__L__ is not None else self.loss_function

    def forward(self, data, label):
        """Compute the loss of a batch (B, ...) with its labels (B, ...); UsageError if it is no single number."""
        result = self.__S__(data, label) if self.loss is None else self.loss(self.__S__(data), label)
        parts = result if isinstance(result, (tuple, list)) else (result, math.nan)
        if len(parts) != 2 or not isinstance(parts[0], torch.Tensor) or parts[0].numel() != 1:
            called = "model(data, label)" if self.loss is None else "loss(model(data), label)"
            shapes = ", ".join(str(tuple(p.shape)) if isinstance(p, torch.Tensor) else type(p).__name__ for p in parts)
            raise UsageError(f"{called} must return the loss (one number) or (loss, accuracy in %); it gave {shapes}")
        return parts[0].reshape(()), parts[1]


class Builder:
    """The function that ``build`` names, 'module:function', and the source files that it depends on.

    ``folder``: where the module's path begins, None to import it as the running program does. UsageError if the module
    cannot be imported or has no such function.
    """

    def __init__(self, build: str, folder: Path | None = None):
        self.build = build
        self.module, _, self.function = build.partition(":")
        if not all(part.isidentifier() for part in (*self.module.split("."), self.function)):
            raise UsageError(f"build: expected 'module:function', as 'classifier:make', got {build!r}")
        self.folder = folder
        self.file = self.find()
        self.check_source()
        self.known: dict[Path, str] = {}

    def find(self) -> Path:
        """The module's file; sets ``folder`` if it was not given."""
        parts = self.module.split(".")
        if self.folder is not None:
            for path in (self.folder.joinpath(*parts).with_suffix(".py"), self.folder.joinpath(*parts, "__init__.py")):
                if path.is_file():
                    return path.resolve()
            raise UsageError(f"build: there is no {'/'.join(parts)}.py in {self.folder}")
        main = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "?").resolve()
        try:
            own = main.stem == self.module and main.is_file()
            origin = str(main) if own else getattr(importlib.util.find_spec(self.module), "origin", None)
        except (ImportError, ValueError) as error:
            raise UsageError(f"build: '{self.module}' cannot be imported: {first_line(error)}") from error
        if not origin or not Path(origin).is_file():
            raise UsageError(f"build: '{self.module}' cannot be imported: there is no {'/'.join(parts)}.py here")
        path = Path(origin).resolve()
        self.folder = path.parents[len(parts) - (0 if path.name == "__init__.py" else 1)]
        return path

    def check_source(self):
        """Refuse what is no code of the user, and a function that is not written in that file or needs arguments."""
        if is_product(self.file) or is_installed(self.file):
            raise UsageError(f"build: {self.file} is no code of yours")
        try:
            tree = ast.parse(self.file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"build: {self.file} is no Python: {first_line(error)}") from error
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == self.function]
        if not found:
            raise UsageError(f"build: {self.file} has no 'def {self.function}()'")
        arguments = found[-1].args
        needed = None in arguments.kw_defaults or len(arguments.posonlyargs + arguments.args) > len(arguments.defaults)
        if needed:
            place = f"{self.file}:{found[-1].lineno}"
            raise UsageError(f"build: {place}: {self.function} must be callable without arguments")
        running = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "?").resolve() == self.file
        if running and not any(isinstance(n, ast.If) and "__name__" in ast.dump(n.test) for n in tree.body):
            raise UsageError(
                f"build: importing {self.file} would train again: put the training under if __name__ == '__main__', "
                f"or {self.function} into a file of its own"
            )

    def make(self) -> tuple[BuiltNetwork, torch.optim.Optimizer]:
        """Import the module and call its function; UsageError if it gives something else than it should."""
        with importable_from(self.folder):
            try:
                module = importlib.import_module(self.module)
            except Exception as error:  # a module may raise anything
                raise UsageError(f"build: '{self.module}' cannot be imported: {first_line(error)}") from error
            found = getattr(module, "__file__", None)
            if Path(found or "?").resolve() != self.file:
                raise UsageError(f"build: '{self.module}' is {found}, expected {self.file}")
            try:
                made = getattr(module, self.function)()
            except Exception as error:  # and so may its function
                raise UsageError(f"build: {self.build} fails: {type(error).__name__}: {first_line(error)}") from error
        parts = made if isinstance(made, tuple) else (made,)
        if len(parts) not in (2, 3) or not isinstance(parts[0], nn.Module) or not hasattr(parts[1], "param_groups"):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise UsageError(f"build: {self.build} must return {EXPECTED}; it returns ({kinds})")
        return BuiltNetwork(parts[0], parts[2] if len(parts) == 3 else None), parts[1]

    def sources(self) -> dict[str, str]:
        """SHA-256 of the module's file and of what it has imported from its folder: 'classifier.py' -> hash."""
        files = {self.file}
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and file.endswith(".py") and getattr(module, "__name__", "") != "__main__":
                path = Path(file).resolve()
                users = path.is_relative_to(self.folder) and not is_installed(path) and not is_product(path)
                if users and path.is_file():  # torch names modules after files that there are not
                    files.add(path)
        for path in files - self.known.keys():
            self.known[path] = source_hash(path)
        return {path.relative_to(self.folder).as_posix(): digest for path, digest in sorted(self.known.items())}


@contextlib.contextmanager
def importable_from(folder: Path):
    """Find modules of this folder before all others."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def optimizer_layout(network: nn.Module, optimizer) -> list[list[str]]:
    """Names of the parameters in each group of the optimizer."""
    names = {id(p): name for name, p in network.named_parameters()}
    return [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]


def difference(own: BuiltNetwork, optimizer, made: BuiltNetwork, made_optimizer) -> str:
    """What the network or optimizer that a builder made has otherwise than a loop's own, in words; '' if nothing."""
    if (own.loss is None) != (made.loss is None):
        return f"it returns {'no loss' if made.loss is None else 'a loss'}, unlike the loop"
    mine, its = ({n: tuple(t.shape) for n, t in network.state_dict().items()} for network in (own, made))
    for name in [*mine, *its]:
        if mine.get(name) != its.get(name):
            shapes = [str(shapes.get(name, "nothing")) for shapes in (its, mine)]
            return plain_names(f"'{name}' is {shapes[0]} there, {shapes[1]} in the loop")
    if type(optimizer) is not type(made_optimizer):
        return f"its optimizer is {type(made_optimizer).__name__}, the loop's {type(optimizer).__name__}"
    if optimizer_layout(own, optimizer) != optimizer_layout(made, made_optimizer):
        return "its optimizer holds other parameters, or in other groups or another order, than the loop's"
    return ""


def folder_of(dump: dict) -> Path:
    """The folder below which a dump's module is: the current one or the checkout; UsageError if it is in neither."""
    name = dump["build"].partition(":")[0].replace(".", "/")
    for folder in (Path(os.getcwd()), ROOT):
        if any((folder / file).is_file() for file in (f"{name}.py", f"{name}/__init__.py")):
            return folder.resolve()
    raise UsageError(f"there is no {name}.py in {os.getcwd()}: run the analysis in the folder of {name}.py")


def changed_files(dump: dict, folder: Path) -> list[str]:
    """List the source files that differ from the loop's: changed, missing, or without a hash in the dump."""
    hashes, parts = dump["source_hashes"], dump["build"].partition(":")[0].split(".")
    packages = ["/".join([*parts[:n], "__init__.py"]) for n in range(1, len(parts) + 1)]
    needed = [name for name in packages if (folder / name).is_file()]
    if packages[-1] not in needed:
        needed.append("/".join(parts) + ".py")
    return changed_since(hashes, needed, folder)
