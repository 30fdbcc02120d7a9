"""A change of a source file: as a unified diff, and in force for what is imported under it."""

import contextlib
import difflib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from errors import is_installed
from postmortem.places import path_of, place_of
from settings.user_code import is_product


@dataclass(frozen=True)
class SourcePatch:
    """A file of the checkout ('loss/x.py'), its text, and the text that takes its place."""

    path: str
    before: str
    after: str

    def diff(self) -> str:
        """The change as a unified diff that ``git apply`` and ``patch -p1`` take at the root of the checkout."""
        old, new = (text.splitlines(keepends=True) for text in (self.before, self.after))
        lines = difflib.unified_diff(old, new, f"a/{self.path}", f"b/{self.path}")
        marked = (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
        return "".join(marked)

    @contextlib.contextmanager
    def applied(self):
        """Import plug-ins anew with this change in force, as from a copy of the checkout to which it was applied.

        The file on the disk stays as it is, and so do the modules imported before: they are back afterwards.
        """
        finder = _PatchFinder(self)
        hidden = {name: module for name, module in sys.modules.items() if is_users_module(module)}
        for name in hidden:
            del sys.modules[name]
        sys.meta_path.insert(0, finder)
        try:
            yield self
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name, module in sys.modules.items() if is_users_module(module)]:
                del sys.modules[name]
            sys.modules.update(hidden)


def is_users_module(module) -> bool:
    """Whether a module is a plug-in, or one of the user's own files."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or getattr(module, "__name__", "") == "__main__":
        return False
    path = Path(file)
    return bool(place_of(file, os.getcwd())) and not is_product(path) and not is_installed(path)


class _PatchFinder(importlib.abc.MetaPathFinder):
    """Finds the patched file with its new text, all other modules as usual."""

    def __init__(self, patch: SourcePatch):
        self.patch, self.path = patch, str(path_of(patch.path))

    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin == self.path:
            spec.loader = _PatchLoader(name, self.path, self.patch.after)
        return spec if spec is not None and spec.origin == self.path else None


class _PatchLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from a text in the place of its file."""

    def __init__(self, name: str, path: str, text: str):
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname):
        return compile(self.text, self.path, "exec", dont_inherit=True)
