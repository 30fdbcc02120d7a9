"""Opens a file of tensors that anyone may have made, by restricted loading only; there is no way round it.

The order is the safety: the zip directory is checked, then data.pkl is rehearsed on stand-ins, which tells the size of
every tensor before one exists, and only then torch loads the file.
"""

import math
import os
import pickle
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass

import torch

MAX_BYTES = 8 << 30  # of a file, and of all its tensors together
MAX_PICKLE = 32 << 20  # bytes of data.pkl, which holds everything but the tensors' values
MAX_VALUES = 4_000_000  # names, numbers and containers; a dump of 10,000 rows has 500,000
MAX_ENTRIES = 1 << 16
MAX_DIRECTORY = 16 << 20  # bytes
MAX_DEPTH, MAX_DIMS = 32, 16
ENTRY = re.compile(
    r"data\.pkl|data/\d{1,9}|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    "Bool": torch.bool,
}
STORAGES = {f"torch {name}Storage": dtype.itemsize for name, dtype in DTYPES.items()}
TENSOR, ORDERED, COUNTER = "torch._utils _rebuild_tensor_v2", "collections OrderedDict", "collections Counter"


def printable(text: str) -> str:
    """Text from a file for a terminal: one line, control characters and lone surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DumpError(Exception):
    """A file that is no dump this version can read; the message is one printable line with the file's name."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Refusal(ValueError):
    """What is wrong with the content of a file, without its name, in at most 200 characters."""

    def __init__(self, reason: str):
        super().__init__(reason if len(reason) <= 200 else f"{reason[:197]}...")


def load_plain(path):
    """Load what torch.save wrote as plain containers, numbers, texts and CPU tensors; DumpError for anything else."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise Refusal("is not a regular file")
        if found.st_size > MAX_BYTES:
            raise Refusal(f"larger than {MAX_BYTES >> 30} GiB")
        with open(path, "rb") as file, warnings.catch_warnings(record=True):  # a file does not write to the terminal
            _check_archive(file, found.st_size)
            file.seek(0)
            return plain(torch.load(file, map_location="cpu", weights_only=True, mmap=False))
    except Refusal as refusal:
        raise DumpError(f"{path}: {refusal}") from refusal
    except OSError as error:
        raise DumpError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:  # torch's text advises to load without restriction
        raise DumpError(f"{path}: damaged, or not a dump: restricted loading refuses it") from error
    except Exception as error:  # torch and zipfile pass on what their readers raise, of no common class
        reason = Refusal((str(error).splitlines() or [""])[0] or type(error).__name__)
        raise DumpError(f"{path}: damaged, or not a dump: {reason}") from error


def _check_archive(file, size: int):
    """Refuse a file that torch.save did not write, or whose content would be larger than the bounds."""
    if size == 0:
        raise Refusal("is empty")
    if file.read(4) != b"PK\3\4":  # torch would read anything else in its formats from before 2020
        raise Refusal("not a zip archive of torch.save; its older formats are not opened")
    count = _check_end(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) != count:
            raise Refusal("damaged: its directory has another number of entries than it says")
        sizes = _entry_sizes(entries, size)
        if sizes.get("data.pkl", 0) > MAX_PICKLE:
            raise Refusal(f"its data.pkl is larger than {MAX_PICKLE >> 20} MiB")
        data = next((e for e in entries if e.filename.endswith("/data.pkl")), None)
        if data is None:
            raise Refusal("has no data.pkl, so torch.save did not write it")
        _Rehearsal(sizes).run(archive.read(data))
        damaged = archive.testzip()  # torch does not compare checksums: a flipped bit of a sample would be replayed
        if damaged:
            raise Refusal(f"damaged: entry '{damaged}' does not fit its checksum")


def _check_end(file, size: int) -> int:
    """Check the end records of a zip file and return how many entries they promise.

    They must close the file and lie right behind the directory. Only then do zipfile, which checks the entries, and
    torch, which loads them, find the same directory: an archive with two of them could show each another content.
    """
    file.seek(max(0, size - 98))
    tail = file.read(98).rjust(98, b"\0")
    mark, *_, count, length, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    if mark != b"PK\5\6" or comment:
        raise Refusal("damaged: the end of the archive is missing, perhaps it is cut short")
    end = size - 22
    mark, _, place, _ = struct.unpack("<4sLQL", tail[-42:-22])
    if mark == b"PK\6\7":  # 64-bit sizes, which torch.save always writes
        end = size - 98
        mark, *_, count, length, start = struct.unpack("<4sQ2H2L4Q", tail[:56])
        if mark != b"PK\6\6" or place != end:
            raise Refusal("damaged: the end of the archive is not where it says")
    if start + length != end:
        raise Refusal("damaged: the directory of the archive is not where it says")
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise Refusal(f"has more than {MAX_ENTRIES} entries")
    return count


def _entry_sizes(entries: list[zipfile.ZipInfo], size: int) -> dict[str, int]:
    """Check the entries of an archive of ``size`` bytes; bytes by name, without the folder they all lie in."""
    sizes = {}
    for entry in entries:
        folder, _, name = entry.orig_filename.partition("/")
        if folder in ("", ".", "..") or "\\" in folder or not ENTRY.fullmatch(name):
            raise Refusal(f"has an entry '{entry.orig_filename}', which torch.save does not write")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise Refusal(f"entry '{entry.filename}' is compressed, which torch.save never does")
        if name in sizes or folder != entries[0].filename.partition("/")[0]:
            raise Refusal(f"entry '{entry.filename}' is there twice, or in a second folder")
        sizes[name] = entry.file_size
        if not name.startswith("data") and entry.file_size > 256:
            raise Refusal(f"entry '{entry.filename}' is larger than 256 bytes")
    if sum(sizes.values()) > size:  # entries that share bytes
        raise Refusal("unpacks to more than its own size")
    return sizes


@dataclass(frozen=True)
class _Global:
    """Stand-in for a function or class that a pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Stand-in for the values behind tensors."""

    count: int
    item_bytes: int


class _Rehearsal:
    """Runs a pickle on stand-ins, so that what torch would build is known before it does.

    torch's restricted loading calls nothing harmful, but it does let a file of 100 bytes ask for a tensor or a
    bytearray of any size, and for a dict key that takes a year to hash. ``sizes`` are the bytes of the entries.
    """

    def __init__(self, sizes: dict[str, int]):
        self.sizes, self.bytes, self.kinds = sizes, 0, {}
        self.stack, self.outer, self.memo = [], [], {}

    def run(self, data: bytes):
        """Run all opcodes; Refusal, or what pickletools and an empty stack raise."""
        for count, (code, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_VALUES:
                raise Refusal(f"holds more than {MAX_VALUES} values")
            step = _STEPS.get(code.name)
            if step is None:
                raise Refusal(f"its pickle has the opcode {code.name}, which torch.save does not write")
            step(self, argument)

    def push(self, value):
        self.stack.append(value)

    def protocol(self, number):
        if number != 2:
            raise Refusal(f"is pickled by protocol {number}, not 2 as torch.save does")

    def mark(self, _):
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def take(self, count: int) -> list:
        return [self.stack.pop() for _ in range(count)][::-1]

    def remember(self, place):
        self.memo[place] = self.stack[-1]

    def append(self, items):
        if type(self.stack[-1]) is not list:
            raise Refusal("its pickle appends to something that is no list")
        self.stack[-1].extend(items)

    def set_items(self, items):
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise Refusal("its pickle sets an item of something that is no dict")
        for key, value in zip(items[::2], items[1::2]):
            # 32 bits: larger numbers can be chosen so that all of them meet in one slot of the dict.
            if type(key) is not str and not (type(key) is int and -(2**31) <= key < 2**31):
                raise Refusal(f"has a {type(key).__name__} as the name of a value")
            target[key] = value

    def name(self, argument):
        if argument not in (TENSOR, ORDERED, COUNTER, *STORAGES):
            raise Refusal(f"asks for '{argument.replace(' ', '.')}', which no dump holds")
        self.push(_Global(argument))

    def storage(self, _):
        identity = self.stack.pop()
        kinds = [type(part) for part in identity] if type(identity) is tuple else []
        if kinds != [str, _Global, str, str, int] or identity[0] != "storage":
            raise Refusal("a tensor's storage is not described as torch.save does")
        _, kind, key, _, count = identity
        item_bytes = STORAGES.get(kind.name, 0)
        if not item_bytes or count < 0 or count * item_bytes != self.sizes.get(f"data/{key}"):
            raise Refusal(f"the storage '{key}' is missing or has another size than a tensor says")
        if self.kinds.setdefault(key, kind) != kind:  # torch would take the type it met first, of other sizes
            raise Refusal(f"the storage '{key}' is used as two types")
        self.push(_Storage(count, item_bytes))

    def call(self, _):
        function, arguments = self.take(2)
        called = getattr(function, "name", None)
        if called == TENSOR and type(arguments) is tuple and len(arguments) == 6:
            self.push(self.tensor(*arguments))
        elif called == ORDERED and arguments == ():
            self.push({})
        elif called == COUNTER and type(arguments) is tuple and [type(a) for a in arguments] == [dict]:
            self.push(dict(arguments[0]))
        else:
            raise Refusal("its pickle calls something in another way than torch.save does")

    def tensor(self, storage, offset, size, stride, requires_grad, hooks):
        kinds = [type(part) for part in (storage, size, stride, requires_grad, hooks)]
        if (
            kinds != [_Storage, tuple, tuple, bool, dict]
            or hooks
            or not len(size) == len(stride) <= MAX_DIMS
            or any(type(n) is not int or not 0 <= n <= MAX_BYTES for n in (offset, *size, *stride))
            or math.prod(max(n, 1) for n in size) > MAX_BYTES  # of an empty tensor too: its other sizes are used
        ):
            raise Refusal("a tensor has an impossible shape, or is no plain tensor")
        count = math.prod(size)
        last = offset + (sum((n - 1) * s for n, s in zip(size, stride)) if count else -1)
        if last >= storage.count or count > storage.count:
            shape = "x".join(map(str, size))
            raise Refusal(f"a tensor of shape {shape} claims more than the {storage.count} values behind it")
        self.bytes += count * storage.item_bytes
        if self.bytes > MAX_BYTES:
            raise Refusal(f"its tensors are larger than {MAX_BYTES >> 30} GiB together")
        return torch.Tensor

    def attributes(self, _):
        target, state = self.take(2)
        if type(target) is not dict or type(state) is not dict:
            raise Refusal("its pickle gives attributes to something other than an ordered dict")
        self.push(target)


# What each opcode of torch.save does to a rehearsal; the argument is as pickletools reads it.
_STEPS = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "NONE"), _Rehearsal.push),
    "NEWTRUE": lambda self, _: self.push(True),
    "NEWFALSE": lambda self, _: self.push(False),
    "EMPTY_DICT": lambda self, _: self.push({}),
    "EMPTY_LIST": lambda self, _: self.push([]),
    "EMPTY_TUPLE": lambda self, _: self.push(()),
    "TUPLE": lambda self, _: self.push(tuple(self.since_mark())),
    "TUPLE1": lambda self, _: self.push(tuple(self.take(1))),
    "TUPLE2": lambda self, _: self.push(tuple(self.take(2))),
    "TUPLE3": lambda self, _: self.push(tuple(self.take(3))),
    "APPEND": lambda self, _: self.append(self.take(1)),
    "APPENDS": lambda self, _: self.append(self.since_mark()),
    "SETITEM": lambda self, _: self.set_items(self.take(2)),
    "SETITEMS": lambda self, _: self.set_items(self.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Rehearsal.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda self, place: self.push(self.memo[place])),
    **{"PROTO": _Rehearsal.protocol, "MARK": _Rehearsal.mark, "STOP": lambda self, _: self.stack.pop()},
    **{"GLOBAL": _Rehearsal.name, "BINPERSID": _Rehearsal.storage},
    **{"REDUCE": _Rehearsal.call, "BUILD": _Rehearsal.attributes},
}


def plain(value):
    """Copy a nested value into plain dicts, lists and tuples, its tensors detached and not copied.

    Refusal for other types, too deep or too many values (a list may hold itself), numbers beyond 64 bits, NUL in a
    text, and tensors that are not dense, real and on the CPU.
    """
    left = MAX_VALUES

    def copy(value, depth):
        nonlocal left
        left -= 1
        if left < 0:
            raise Refusal(f"holds more than {MAX_VALUES} values")
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
    return not tensor.is_neg() and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
