"""What torch.save wrote, checked before torch loads it: nothing runs, and nothing is larger than the file pays for.

The order is the safety: the zip directory is checked, then data.pkl is rehearsed on stand-ins, which tells the size of
every tensor before one exists, and only then torch loads the file, by restricted loading.
"""

import math
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass

import torch

from storage import seal

MAX_BYTES = 8 << 30  # of a dump, and of all tensors of a file together, unless it is a larger checkpoint
MAX_PICKLE = 32 << 20  # bytes of data.pkl, which holds everything but the tensors' values
MAX_VALUES = 4_000_000  # names, numbers and containers; a dump of 10,000 rows has 500,000
MAX_ENTRIES = 1 << 16
MAX_DIRECTORY = 16 << 20  # bytes
MAX_DIMS = 16
ENTRY = re.compile(
    r"data\.pkl|data/\d{1,20}|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
PICKLE = b"\x80"  # its first byte, of protocol 2 on
BEFORE_2020 = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
CONVERT = (
    'python -c "import sys, torch; a, b = sys.argv[1:]; '
    "torch.save(torch.load(a, 'cpu', weights_only=True), b)\" OLD.pt NEW.pt"
)
DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
STORAGES = {f"torch {name}Storage": dtype.itemsize for name, dtype in DTYPES.items()}
TENSOR, ORDERED, COUNTER = "torch._utils _rebuild_tensor_v2", "collections OrderedDict", "collections Counter"
PARAMETER, SIZE, DEVICE = "torch._utils _rebuild_parameter", "torch Size", "torch device"


class Refusal(ValueError):
    """What is wrong with the content of a file, without its name, in at most 200 characters."""

    def __init__(self, reason: str):
        super().__init__(reason if len(reason) <= 200 else f"{reason[:197]}...")


def check_archive(file, size: int, rehearsal=None):
    """Refuse a file that torch.save did not write, or whose content would be larger than the bounds.

    ``rehearsal``: the kind of content, ``Rehearsal`` (plain values, the default) or ``CheckpointRehearsal``.
    """
    if size == 0:
        raise Refusal("is empty")
    begin = file.read(len(BEFORE_2020))
    if begin == BEFORE_2020:
        raise Refusal(f"is in torch.save's format from before 2020; convert it: {CONVERT}")
    if begin[:4] != b"PK\3\4":
        raise Refusal("not a zip archive of torch.save")
    sealed = seal.seal_of(file, size)
    if sealed and not seal.is_whole(file, size):
        raise Refusal("damaged: its content does not fit its SHA-256")
    count = _check_end(file, size, seal.COMMENT if sealed else 0)
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
        (rehearsal or Rehearsal)(sizes).run(archive.read(data))
        # torch does not compare checksums: a flipped bit of a sample would be replayed.
        damaged = None if sealed else archive.testzip()
        if damaged:
            raise Refusal(f"damaged: entry '{damaged}' does not fit its checksum")


def _check_end(file, size: int, comment: int = 0) -> int:
    """Check the end records of a zip file with ``comment`` bytes behind them; returns how many entries they promise.

    They must close the file and lie right behind the directory. Only then do zipfile, which checks the entries, and
    torch, which loads them, find the same directory: an archive with two of them could show each another content.
    """
    size -= comment
    file.seek(max(0, size - 98))
    tail = file.read(min(size, 98)).rjust(98, b"\0")
    mark, *_, count, length, start, said = struct.unpack("<4s4H2LH", tail[-22:])
    if mark != b"PK\5\6" or said != comment:
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


class Rehearsal:
    """Runs a pickle on stand-ins, so that what torch would build is known before it does.

    torch's restricted loading calls nothing harmful, but it does let a file of 100 bytes ask for a tensor or a
    bytearray of any size, and for a dict key that takes a year to hash. ``sizes`` are the bytes of the entries.
    """

    what = "dump"
    more_names = ()

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes
        self.most = MAX_BYTES  # of all tensors together
        self.bytes = 0
        self.kinds = {}
        self.stack = []
        self.outer = []
        self.memo = {}

    def run(self, data):
        """Run all opcodes of bytes or of a file; Refusal, or what pickletools and an empty stack raise."""
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
        items = self.stack
        self.stack = self.outer.pop()
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
        if argument not in (TENSOR, ORDERED, COUNTER, *STORAGES, *self.more_names):
            raise Refusal(f"asks for '{argument.replace(' ', '.')}', which no {self.what} holds")
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
        if self.bytes > self.most:
            raise Refusal(f"its tensors are larger than {self.most >> 30} GiB together")
        return torch.Tensor

    def attributes(self, _):
        target, state = self.take(2)
        if type(target) is not dict or type(state) is not dict:
            raise Refusal("its pickle gives attributes to something other than an ordered dict")
        self.push(target)


class CheckpointRehearsal(Rehearsal):
    """Of a checkpoint, which may also hold parameters, shapes, devices and types, and be as large as its classes want.

    A tensor that has two names, as a weight that two layers share, is in the file once.
    """

    what = "checkpoint"
    more_names = (PARAMETER, SIZE, DEVICE, *(str(dtype).replace(".", " ") for dtype in DTYPES.values()))

    def __init__(self, sizes: dict[str, int]):
        super().__init__(sizes)
        self.most = max(self.most, 2 * sum(sizes.values()))

    def call(self, _):
        name = getattr(self.stack[-2], "name", None)
        if name not in (PARAMETER, SIZE, DEVICE):
            return super().call(_)
        _, arguments = self.take(2)
        if type(arguments) is not tuple or (name == PARAMETER and arguments[:1] != (torch.Tensor,)):
            raise Refusal("its pickle calls something in another way than torch.save does")
        return self.push(torch.Tensor if name == PARAMETER else arguments)


class OldRehearsal(CheckpointRehearsal):
    """Of a checkpoint in torch's form from before 2020, a file of ``size`` bytes: pickles, then the values."""

    def __init__(self, size: int):
        super().__init__({})
        self.left = size

    def storage(self, _):
        identity = self.stack.pop()
        kinds = [type(part) for part in identity[:5]] if type(identity) is tuple else []
        if kinds != [str, _Global, str, str, int] or identity[0] != "storage":
            raise Refusal("a tensor's storage is not described as torch.save does")
        _, kind, key, _, count = identity[:5]
        item_bytes = STORAGES.get(kind.name, 0)
        self.left -= 0 if key in self.kinds else count * item_bytes
        if not item_bytes or count < 0 or self.left < 0 or self.kinds.setdefault(key, (kind, count)) != (kind, count):
            raise Refusal(f"the storage '{key}' has another size than the file has bytes for")
        self.push(_Storage(count, item_bytes))


def check_checkpoint(file, size: int):
    """Refuse a checkpoint that torch.save did not write in any of its forms, or that is larger than it should be."""
    old = file.read(4) != b"PK\3\4"
    file.seek(0)
    if not old or not size:
        return check_archive(file, size, CheckpointRehearsal)
    begin = file.read(4)
    file.seek(0)
    if begin[:1] != PICKLE:
        raise Refusal(f"damaged, or not a checkpoint: it begins with {begin!r}, as nothing that torch.save writes")
    for _ in range(4):  # a magic number, the version of the form, the sizes of types, and the content
        OldRehearsal(size).run(file)
    return None


# What each opcode of torch.save does to a rehearsal; the argument is as pickletools reads it.
_STEPS = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "NONE"), Rehearsal.push),
    "SHORT_BINSTRING": Rehearsal.push,
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
    "BINPUT": Rehearsal.remember,
    "LONG_BINPUT": Rehearsal.remember,
    "BINGET": lambda self, place: self.push(self.memo[place]),
    "LONG_BINGET": lambda self, place: self.push(self.memo[place]),
    "PROTO": Rehearsal.protocol,
    "MARK": Rehearsal.mark,
    "STOP": lambda self, _: self.stack.pop(),
    "GLOBAL": Rehearsal.name,
    "BINPERSID": lambda self, _: self.storage(_),
    "REDUCE": lambda self, _: self.call(_),
    "BUILD": Rehearsal.attributes,
}
