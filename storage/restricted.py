"""Opens a file of tensors that anyone may have made, by restricted loading only; there is no way round it."""

import os
import pickle
import stat
import warnings
from collections import Counter, OrderedDict

import torch

from errors import first_line
from storage import archive
from storage.archive import DTYPES, MAX_BYTES, Refusal, check_archive

MAX_DEPTH = 32


def printable(text: str) -> str:
    """Text from a file for a terminal: one line, control characters and lone surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DumpError(Exception):
    """A file that is no dump this version can read; the message is one printable line with the file's name."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def load_plain(path):
    """Load what torch.save wrote as plain containers, numbers, texts and CPU tensors; DumpError for anything else."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise Refusal("is not a regular file")
        if found.st_size > MAX_BYTES:
            raise Refusal(f"larger than {MAX_BYTES >> 30} GiB")
        with open(path, "rb") as file, warnings.catch_warnings(record=True):  # a file does not write to the terminal
            check_archive(file, found.st_size)
            file.seek(0)
            return plain(torch.load(file, map_location="cpu", weights_only=True, mmap=False))
    except Refusal as refusal:
        raise DumpError(f"{path}: {refusal}") from refusal
    except OSError as error:
        raise DumpError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:  # torch's text advises to load without restriction
        raise DumpError(f"{path}: damaged, or not a dump: restricted loading refuses it") from error
    except Exception as error:  # torch and zipfile pass on what their readers raise, of no common class
        raise DumpError(f"{path}: damaged, or not a dump: {Refusal(first_line(error))}") from error


def plain(value):
    """Copy a nested value into plain dicts, lists and tuples, its tensors detached and not copied.

    Refusal for other types, too deep or too many values (a list may hold itself), numbers beyond 64 bits, NUL in a
    text, and tensors that are not dense, real and on the CPU.
    """
    left = archive.MAX_VALUES

    def copy(value, depth):
        nonlocal left
        left -= 1
        if left < 0:
            raise Refusal(f"holds more than {archive.MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise Refusal(f"is nested more than {MAX_DEPTH} deep")
        kind = type(value)
        if value is None or kind in (bool, float):
            return value
        if kind is int and -(2**63) <= value < 2**64:
            return value
        if kind is str and "\0" not in value:
            return value
        if kind is torch.Tensor and _is_plain_tensor(value):
            return value.detach()
        if kind in (list, tuple):
            return kind([copy(item, depth + 1) for item in value])
        if kind in (dict, OrderedDict, Counter):
            if any(type(key) not in (str, int) for key in dict.keys(value)):
                raise Refusal("has something other than a text or a whole number as the name of a value")
            # Not value.items(): a file can give an OrderedDict an attribute 'items' of its own.
            return {copy(key, depth): copy(item, depth + 1) for key, item in dict.items(value)}
        faults = {int: "a number beyond 64 bits", str: "a NUL in a text", torch.Tensor: "no plain tensor"}
        raise Refusal(f"holds {faults[kind]}" if kind in faults else f"holds a {kind.__name__}, which no dump does")

    return copy(value, 0)


def _is_plain_tensor(tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
        return False
    return (
        not (tensor.is_neg() or tensor.is_conj())
        and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
    )
