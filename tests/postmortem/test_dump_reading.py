"""A dump may come from anyone: whatever the file is, reading it runs nothing, ends soon, and says one line."""

import collections
import io
import math
import os
import pickle
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from storage import archive
from storage.dump import KEYS, DumpError, DumpWriter, content_hash, read_checkpoint, read_dump, read_state, validate

NAN, NAME = math.nan, "state_0123456789abcdef.pt"
OLD = {"batch_idx": 3, "epoch": 1, "data": torch.randn(4, 20, 6), "label": torch.arange(4), "loss": NAN, "prec1": 25.0}
STATS = {"w": {"numel": 4, "nan": 1, "inf": 0, "abs_max": 2.0, "norm": math.inf}}
DRAW = {"kind": "noise", "path": "n.wav", "start": 3, "snr_db": 1.5, "gain": 0.1}
ROW = {"path": "a/b.wav", "line": 3, "start": 0, "rate": 16000, "speed": 1.0, "peak": NAN, "augment": [DRAW]}


def good(**changes) -> dict:
    """A dump of format 1: two batches of two rows accumulated, two utterances a row."""
    dump = {
        **{"format_version": 1, "reason": "loss_nonfinite", "batch_idx": 2, "epoch": 1, "step": 7, "rank": 0},
        **{"loss": NAN, "prec1": 0.0, "data": torch.randn(2, 4, 30), "label": torch.arange(4), "files": [ROW] * 8},
        **{"lr": 0.1, "scaler_scale": 1.0, "amp_dtype": "bfloat16", "grad_norm": math.inf, "grad_stats": STATS},
        **{"param_stats": STATS, "history": [{"step": 1, "loss": 0.5, "scale": 1.0}], "threads": 1, "device": "cuda:0"},
        "rng_state": {
            "torch": torch.get_rng_state(),
            "numpy": ["MT19937", [1, 2**32 - 1], 624, 0, 0.0],
            "python": [3, [1, 2], None],
        },
        **{"config": {"lr": 0.1, "augment": True, "path": None, "speeds": [0.9, 1]}, "versions": {"torch": "2.11"}},
        **{"source_hashes": {"models/x.py": "ab"}, "state": NAME},
        **{"window": [2, 2], "injected": "data", "world": 2, "from_later": {"note": [1, (2, None)]}},
    }
    return {**dump, **changes}


def refused(path, read=read_dump) -> str:
    """The message of the DumpError that reading gives: one printable line that names the file."""
    with pytest.raises(DumpError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable() and Path(path).name in message and len(message) < 500
    return message


# ------------------------------------------------------------------------------------------------- hostile files


def pack(path, data: bytes | None, entries=(), folder="archive", **options):
    """Write an archive as torch.save does, of the given data.pkl and other (name, content) entries."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in [("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little"), *entries]:
            if content is not None:
                archive.writestr(f"{folder}/{name}", content)


class Ghost:
    """A storage that only a pickle speaks of."""

    def __init__(self, count=1, key="0", kind=torch.FloatStorage):
        self.identity = ("storage", kind, key, "cpu", count)


class Call:
    """Pickled as a call of a function with arguments and, perhaps, attributes and items of what it returns."""

    def __init__(self, function, arguments, *more):
        self.call = (function, arguments, *more)

    def __reduce__(self):
        return self.call


class GhostPickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Ghost) else None


def pickled(value, protocol=2) -> bytes:
    """Pickle a value with its Ghosts and Calls."""
    stream = io.BytesIO()
    GhostPickler(stream, protocol).dump(value)
    return stream.getvalue()


def tensor(size, stride, offset=0, ghost=None, hooks=None, **more):
    """A tensor as torch pickles it, of any shape and over a storage of 4 bytes."""
    arguments = (ghost or Ghost(), offset, size, stride, False, collections.OrderedDict(hooks or {}), *more.values())
    return Call(torch._utils._rebuild_tensor_v2, arguments)


def of_pickle(value, **options):
    """Writes an archive with a pickle, and 4 bytes of data that it may speak of."""
    data = value if isinstance(value, bytes) else pickled(value, **options)
    return lambda path: pack(path, data, [("data/0", b"\0\0\0\0")])


def of_torch(value, **options):
    """Writes a file by torch.save."""
    return lambda path: torch.save(value, path, **options)


def of_entries(*entries, data=b"\x80\x02}.", **options):
    """Writes an archive of a harmless data.pkl and other entries."""
    return lambda path: pack(path, data, entries, **options)


def of_bytes(change):
    """Writes the bytes of a good dump after a change."""

    def make(path):
        torch.save(good(), path)
        path.write_bytes(change(path.read_bytes()))

    return make


def tar_file(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


def second_directory(content: bytes) -> bytes:
    """Let the 64-bit record, which torch follows, and the place right before the end, where zipfile looks, differ."""
    locator = content[-42:-22]
    return content[:-42] + content[-98:-42] + locator + content[-22:]


def overlapping(path):
    """Many entries that share the same megabyte."""
    pack(path, b"\x80\x02}.", [("data/0", bytes(1 << 20)), *((f"data/{i}", b"") for i in range(1, 50))])
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\1\2")
    shared = content.index(b"archive/data/0", first) - 46
    place = shared
    while content[place : place + 4] == b"PK\1\2":
        content[place + 16 : place + 28] = content[shared + 16 : shared + 28]
        content[place + 42 : place + 46] = content[shared + 42 : shared + 46]
        place += 46 + struct.unpack_from("<H", content, place + 28)[0]
    path.write_bytes(content)


def unreadable(path):
    path.write_bytes(b"PK\3\4")
    path.chmod(0)


def nested(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def doubled(levels: int, end: bytes = b".") -> bytes:
    """A tuple of a tuple with itself: 2 ** levels values in a few bytes."""
    return b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels)) + end


WIDE = 10**12
SPARSE = torch.eye(3).to_sparse()
QUANTIZED = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
BYTES = Ghost(4, kind=torch.ByteStorage)
MANY_VIEWS = [tensor((1 << 20,), (1,), ghost=Ghost(1 << 20, "1")) for _ in range(2049)]
COLLIDING = {i * (2**61 - 1): None for i in range(1, 5)}  # all hash to 0
HOSTILE = {
    **{"empty": (lambda p: p.write_bytes(b""), "is empty"), "text": (lambda p: p.write_text("no dump"), "not a zip")},
    **{"directory": (Path.mkdir, "not a regular file"), "pipe": (os.mkfifo, "not a regular file")},
    **{"missing": (lambda p: None, "No such file"), "link": (lambda p: p.symlink_to("nowhere"), "No such file")},
    **{"link_to_device": (lambda p: p.symlink_to("/dev/zero"), "not a regular file"), "tar": (tar_file, "not a zip")},
    "permission": (unreadable, "Permission denied"),
    "legacy": (of_torch(good(), _use_new_zipfile_serialization=False), "from before 2020; convert it: python -c"),
    **{f"cut_at_{n}": (of_bytes(lambda b, n=n: b[:n]), "cut short") for n in (4, 100, 3000, -300, -98, -22, -1)},
    "cut_to_2": (of_bytes(lambda b: b[:2]), "not a zip archive"),
    "prefixed": (of_bytes(lambda b: b"PK\3\4" + b), "not where it says"),
    "prefixed_by_pickle": (of_bytes(lambda b: b"\x80\x02}." + b), "not a zip archive"),
    "commented": (of_bytes(lambda b: b[:-2] + b"\1\0x"), "cut short"),
    "two_ends": (of_bytes(lambda b: b + b[-98:]), "not where it says"),
    "second_directory": (of_bytes(second_directory), "not where it says"),
    "sample_flipped": (of_bytes(lambda b: b.replace(good_sample(b), b"\1\2\3\4", 1)), "checksum"),
    "no_pickle": (of_entries(data=None), "no data.pkl"),
    "zip_bomb": (of_entries(("data/0", bytes(1 << 24)), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "zip_bomb_bz2": (of_entries(data=bytes(1 << 22), compression=zipfile.ZIP_BZIP2), "compressed"),
    "overlapping": (overlapping, "unpacks to more"),
    "up": (of_entries(("../../x.pkl", b"")), "torch.save does not write"),
    "up_folder": (of_entries(folder=".."), "torch.save does not write"),
    "absolute": (of_entries(folder="/etc"), "torch.save does not write"),
    "backslash": (of_entries(folder="..\\x"), "torch.save does not write"),
    "control": (of_entries(("data/\x1b[2J\n", b"")), "torch.save does not write"),
    "script": (of_entries(("constants.pkl", b"\x80\x02).")), "torch.save does not write"),
    "long_version": (of_entries((".format_version", b"1" * 9999)), "larger than 256 bytes"),
    "long_alignment": (of_entries((".storage_alignment", b"9" * 5000)), "larger than 256 bytes"),
    "many_entries": (of_entries(*((f"data/{i}", b"") for i in range(1100))), "more than 1000 entries"),
    "large_pickle": (of_entries(data=bytes((32 << 20) + 1)), "data.pkl is larger"),
    "many_values": (of_pickle(b"\x80\x02" + b"N" * 100_100 + b"."), "100000 values"),
    "bytearray": (of_pickle({"x": Call(bytearray, (WIDE,))}), "asks for"),
    "tensor_class": (of_pickle({"x": Call(torch.FloatTensor, (WIDE,))}), "asks for 'torch.FloatTensor'"),
    "huge_shape": (of_pickle({"data": tensor((50_000, 50_000), (50_000, 1))}), "shape 50000x50000 claims more"),
    "absurd_shape": (of_pickle({"data": tensor((2**62, 2**62), (1, 1))}), "impossible shape"),
    "absurd_empty": (of_pickle({"data": tensor((0, 2**32, 2**32), (1, 1, 1))}), "impossible shape"),
    "expanded": (of_pickle({"data": tensor((2**30,), (0,))}), "shape 1073741824 claims more"),
    "expanded_by_torch": (of_torch({"data": torch.zeros(1).expand(99)}), "claims more than the 1 values"),
    "many_dims": (of_pickle({"data": tensor((1,) * 65, (1,) * 65)}), "impossible shape"),
    "negative": (of_pickle({"data": tensor((1,), (-1,), -1)}), "impossible shape"),
    "beyond": (of_pickle({"data": tensor((1,), (1,), 7)}), "claims more"),
    "size_list": (of_pickle({"data": tensor([1], [1])}), "impossible shape"),
    "true_size": (of_pickle({"data": tensor((True,), (1,))}), "impossible shape"),
    "hooks": (of_pickle({"data": tensor((1,), (1,), hooks={0: print})}), "asks for"),
    "negated": (of_pickle({"data": tensor((1,), (1,), metadata={"neg": True})}), "calls something"),
    "long_storage": (of_pickle({"data": tensor((1,), (1,), ghost=Ghost(WIDE))}), "another size"),
    "no_storage": (of_pickle({"data": tensor((1,), (1,), ghost=Ghost(1, "1"))}), "missing"),
    "odd_key": (of_pickle({"data": tensor((1,), (1,), ghost=Ghost(1, ((),)))}), "not described"),
    "two_types": (of_pickle([tensor((1,), (1,)), tensor((4,), (1,), ghost=BYTES)]), "two types"),
    "many_views": (of_entries(("data/1", bytes(1 << 22)), data=pickled(MANY_VIEWS)), "larger than 8 GiB together"),
    "large": (lambda p: (p.touch(), os.truncate(p, (8 << 30) + 1)), "larger than 8 GiB"),
    "sparse": (of_torch({"x": SPARSE}), "sparse"),
    **{"quantized": (of_torch({"x": QUANTIZED}), "qtensor"), "meta": (of_torch(torch.ones(1, device="meta")), "meta")},
    **{"complex": (of_torch(torch.ones(1) * 1j), "a Tensor"), "complex_number": (of_torch({"x": 1j}), "asks for")},
    **{"parameter": (of_torch(torch.nn.Parameter(torch.ones(1))), "parameter"), "set": (of_torch({1}), "asks for")},
    **{"module": (of_torch(torch.nn.Linear(1, 1)), "asks for"), "bytes": (of_torch({"x": b"1"}), "asks for")},
    **{"numpy": (of_torch({"x": np.float64(1)}), "numpy"), "path": (of_torch({"x": Path("x")}), "pathlib")},
    **{"nested": (of_pickle(nested(40_000)), "32 deep"), "own_member": (of_pickle(b"\x80\x02]q\0h\0a."), "32 deep")},
    **{"doubled": (of_pickle(doubled(25)), "100000 values"), "list": (of_torch([1]), "holds a list, not a dump")},
    "tuple_as_name": (of_pickle(doubled(60, b"q\xff}h\xffNs.")), "as the name"),
    "colliding": (of_pickle({"x": COLLIDING}), "as the name"),
    "true_as_name": (of_pickle({True: 1}), "as the name"),
    **{"huge_int": (of_torch({"x": 2**2000}), "beyond 64 bits"), "nul": (of_torch({"x": "a\0b"}), "NUL")},
    **{"protocol_4": (of_pickle({}, protocol=4), "protocol 4"), "no_stop": (of_pickle(b"\x80\x02}"), "damaged")},
    **{"stackless": (of_pickle(b"\x80\x02."), "damaged"), "unknown_opcode": (of_pickle(b"\x80\x02\xff."), "damaged")},
    **{"dup": (of_pickle(b"\x80\x02}2."), "opcode DUP"), "class": (of_pickle(b"\x80\x02}\x81."), "opcode NEWOBJ")},
    "memo": (of_pickle(b"\x80\x02}h\x05."), "damaged"),
    "append_to_dict": (of_pickle(b"\x80\x02}Na."), "no list"),
    "item_of_list": (of_pickle(b"\x80\x02]NNs."), "no dict"),
    "attribute_of_list": (of_pickle(b"\x80\x02]}b."), "attributes"),
    "future": (of_torch(good(format_version=2)), "format 2 is newer than this version reads (1)"),
}


def good_sample(content: bytes) -> bytes:
    """Bytes that stand in a good dump's data and nowhere else."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        return archive.read(name)[40:44]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_broken_file_is_refused_in_one_line(case, tmp_path, capfd, recwarn, monkeypatch):
    monkeypatch.setattr(archive, "MAX_VALUES", 100_000)  # a fortieth, for a quick test
    monkeypatch.setattr(archive, "MAX_ENTRIES", 1000)
    make, reason = HOSTILE[case]
    if case == "permission" and os.geteuid() == 0:
        pytest.skip("root may read every file")
    path = tmp_path / f"nan_{case}.pt"
    make(path)
    message = refused(path)
    assert reason in message
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize("function", [os.system, eval, exec, os.remove, torch.load, torch.hub.load])
@pytest.mark.parametrize("form", ["pickle", "archive", "torch", "legacy", "key"])
def test_nothing_in_a_file_is_executed(function, form, tmp_path):
    sentinel, kept = tmp_path / "executed", tmp_path / "kept"
    kept.write_text("")
    code = {os.system: f"touch {sentinel}", os.remove: str(kept)}.get(function, f"open({str(sentinel)!r}, 'w')")
    call, path = Call(function, (code,)), tmp_path / "evil.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(good(extra=call), 2))
    elif form == "archive":
        pack(path, pickled({**OLD, "data": call, "label": call}))
    elif form == "key":
        pack(path, pickled({"model_state_dict": {call: 1}}))
    else:
        torch.save(good(extra=call), path, _use_new_zipfile_serialization=form == "torch")
    message = refused(path)
    assert any(words in message for words in ("which no dump holds", "not a zip archive", "before 2020"))
    refused(path, read_checkpoint)
    assert kept.exists() and not sentinel.exists()


def test_the_environment_does_not_loosen_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": Path("x")}, tmp_path / "x.pt")
    torch.serialization.add_safe_globals([type(Path())])
    try:
        assert "asks for" in refused(tmp_path / "x.pt", read_checkpoint)
    finally:
        torch.serialization.clear_safe_globals()


def test_file_names_are_escaped_and_texts_shortened(tmp_path):
    path = tmp_path / "a\n\x1b[31m.pt"
    with pytest.raises(DumpError) as caught:
        read_dump(path)
    assert str(caught.value).isprintable() and "a\\n\\x1b[31m.pt" in str(caught.value)
    refused(tmp_path / ("x" * 10), lambda p: validate(good(reason="\x1b]0;" + "x" * 10_000), p))
    with pytest.raises(DumpError):
        read_dump("nul\0.pt")


@pytest.mark.parametrize("part", ["anywhere", "pickle", "directory"])
def test_mutated_dumps_give_a_dump_or_one_line(part, tmp_path):
    path = tmp_path / "mutated.pt"
    pack(path, *of_good_parts())
    content = path.read_bytes()
    data, directory = content.index(b"\x80\x02}"), content.index(b"PK\1\2")
    begin, end = {"anywhere": (0, len(content)), "directory": (directory, len(content))}.get(
        part, (data, content.index(b"PK\3\4", data))
    )
    draw, read = random.Random(4), 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 5])):
            changed[draw.randrange(begin, end)] = draw.choice([0, 1, 127, 128, 255, draw.choice(content)])
        if part == "pickle":  # with its checksum, so that the change is reached
            checksum = struct.pack("<L", zipfile.crc32(changed[begin:end]))
            changed[14:18] = changed[directory + 16 : directory + 20] = checksum
        path.write_bytes(changed)
        try:
            read_dump(path)
            read += 1
        except DumpError as error:
            assert str(error).isprintable() and "mutated.pt" in str(error)
    assert 0 < read < 300


def of_good_parts():
    """data.pkl and the other entries of a good dump without its bulk."""
    buffer = io.BytesIO()
    torch.save(good(rng_state={}), buffer)
    with zipfile.ZipFile(buffer) as archive:
        content = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    return content["data.pkl"], [(n, c) for n, c in content.items() if n.startswith("data/")]


# ----------------------------------------------------------------------------------------------- wrong contents

NOT = {"int": [True, 1.5, "1", None], "number": [True, "1", None, torch.tensor(1.0), [1.0]], "text": [1, None, ["a"]]}
WRONG = {
    **dict.fromkeys(("batch_idx", "epoch", "step", "rank", "world"), NOT["int"]),
    **dict.fromkeys(("loss", "prec1", "lr", "scaler_scale", "grad_norm"), NOT["number"]),
    "threads": [*NOT["int"], 0, -1, 10**9],
    "data": [1, [[0.5]], torch.ones(2, 4, 3).short(), torch.zeros((1,) * 5), torch.zeros(2, 4, 3) * 1j, SPARSE],
    "label": [1, [0], torch.zeros(4), torch.ones(4) > 0, torch.arange(3), torch.tensor(1), torch.eye(2).long()],
    "files": [{}, [1], [ROW] * 7, [{"path": "a"}] * 8, *([{**ROW, key: b"x"}] * 8 for key in ROW)],
    "reason": [1, "nan", "", "loss_nonfinite|", "loss_nonfinite\n", None],
    "amp_dtype": [1, "load", "torch.float16", None],
    "device": [0, "cpu; rm", "", "cuda:0\n"],
    **{k: [[], {1: {}}, {"w": 1}, {"w": {}}, {"w": {**STATS["w"], "nan": 0.5}}] for k in ("grad_stats", "param_stats")},
    "history": [{}, [1], [{"loss": "x"}], [{"loss": None}], [{1: 2.0}], [{"loss": True}]],
    "rng_state": [
        *([], {"torch": [1]}, {"torch": torch.zeros(9)}, {"cuda": torch.zeros(2, 2, dtype=torch.uint8)}),
        *({"numpy": "x"}, {"numpy": [1, [1], 1, 1, 1.0]}, {"numpy": ["a", [1]]}, {"python": [3, ["1"], None]}),
    ],
    "config": [[], {1: 2}, {"a": {}}, {"a": [[1j]]}, {"a": torch.zeros(1)}],
    **{k: [[], {"a": 1}, {1: "a"}, "torch", {"a": None}] for k in ("versions", "source_hashes")},
    "state": [
        *(None, 1, f"../{NAME}", f"/tmp/{NAME}", f"{NAME}\n"),
        *(f"x/{NAME}", "state_0123.pt", "state_0123456789ABCDEF.pt", "state_" + "a" * 65 + ".pt"),
    ],
    "format_version": [True, "1", 1.0, -1, 2, None],
    "window": [4, [], [2], [2, 2.0], [5, -1], [4, 0], [True, 3]],
    "injected": NOT["text"],
    "extra": [{1, 2}, b"x", object(), print, 1j, {"a": [np.float32(1)]}, {(1, 2): 3}, 2**64, "\0", SPARSE],
}


@pytest.mark.parametrize("key", WRONG)
def test_wrong_types_are_named(key):
    for value in WRONG[key]:
        message = refused("x.pt", lambda path, value=value: validate(good(**{key: value}), path))
        assert f"'{key}" in message or message.startswith(("x.pt: holds", "x.pt: has", "x.pt: format 2")), message


def test_every_key_is_needed():
    assert validate(good(), "x")
    for key in KEYS.keys() - {"format_version"}:
        dump = {k: v for k, v in good().items() if k != key}
        assert f"has no '{key}'" in refused("x.pt", lambda path, dump=dump: validate(dump, path))
    for key in OLD:
        dump = {k: v for k, v in OLD.items() if k != key}
        assert f"has no '{key}'" in refused("x.pt", lambda path, dump=dump: validate(dump, path))
    wrong = {"loss": torch.zeros(2), "prec1": "1", "data": [1], "label": torch.zeros(1), "epoch": 1.0}
    for key, value in wrong.items():
        assert f"'{key}'" in refused("x.pt", lambda path, key=key, value=value: validate({**OLD, key: value}, path))


# -------------------------------------------------------------------------------------------------- good files


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": torch.tensor(NAN), "files": [], "window": []},
        {"data": torch.zeros(2, 4, 0)},
        {"data": torch.full((2, 4, 9), NAN, dtype=torch.float16), "files": []},
        {
            "data": torch.zeros(4, 9, dtype=torch.float64),
            "files": [ROW] * 4,
            "label": torch.arange(4, dtype=torch.int32),
        },
        {"data": torch.randn(30, 4, 2).transpose(0, 2).bfloat16(), "grad_stats": {}, "param_stats": {}, "history": []},
        {"files": [{"path": "\udc80.wav", "line": 1}] * 8, "state": "", "injected": "", "loss": -math.inf, "lr": 1},
    ],
)
def test_good_dumps_are_read_as_they_were_written(changes, tmp_path):
    said = []
    writer = DumpWriter(tmp_path / "debug_nan", 5, 1, said.append)
    dump = good(**changes)
    state = {
        "model_state_dict": {"w": torch.randn(3, 2), "n": torch.tensor(4), "h": torch.zeros(2).half()},
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 2), "momentum_buffer": None}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "fused": None, "params": [0]}],
        },
    }
    writer.submit("nan_batch_2_epoch_1.pt", dict(dump), state)
    writer.close()
    path = tmp_path / "debug_nan" / "nan_batch_2_epoch_1.pt"
    read = read_dump(path)
    assert not said and read.keys() == dump.keys()
    assert (
        torch.equal(read["data"].nan_to_num(), dump["data"].nan_to_num()) and read["data"].dtype == dump["data"].dtype
    )
    same = [k for k in dump if k not in ("data", "label", "loss", "rng_state", "state")]
    assert repr([read[k] for k in same]) == repr([dump[k] for k in same])
    back = read_state(path, read["state"])
    assert repr(back) == repr(state) and list(back) == ["model_state_dict", "optimizer_state_dict"]


def test_an_old_dump_in_the_format_from_before_2020_says_the_command_that_converts_it(tmp_path, monkeypatch):
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    dump = {"batch_idx": 3, "epoch": 1, "data": torch.randn(4, 50), "label": torch.arange(4), "loss": NAN, "prec1": 0.0}
    torch.save(dump, old, _use_new_zipfile_serialization=False)
    command, files = refused(old).split("convert it: ")[1].split('" ')
    assert files == "OLD.pt NEW.pt"
    monkeypatch.setattr("sys.argv", ["-c", str(old), str(new)])
    exec(command.removeprefix('python -c "'))
    assert torch.equal(read_dump(new)["data"], dump["data"])


def test_a_state_is_read_by_its_bare_name_only(tmp_path):
    dump, name = tmp_path / "nan_x.pt", NAME
    assert "No such file" in refused(tmp_path / name, lambda p: read_state(dump, name))
    for trick in ("", f"../{name}", str(tmp_path / name), f"./{name}", f"{name}\n", "nan_x.pt", None, 3):
        refused(dump, lambda p, trick=trick: read_state(p, trick))
    model, optimizer = {"w": torch.zeros(2)}, {"state": {}, "param_groups": [{"params": [0]}]}
    wrong = [("model_state_dict", value) for value in (None, {"w": 1}, {1: torch.zeros(1)})]
    wrong += [("optimizer_state_dict", {**optimizer, "state": value}) for value in ([], {"a": {}}, {0: 1}, {0: {0: 1}})]
    wrong += [("optimizer_state_dict", {**optimizer, "param_groups": value}) for value in ({}, [1], [{}])]
    for part, value in wrong:
        torch.save({"model_state_dict": model, "optimizer_state_dict": optimizer, part: value}, tmp_path / name)
        assert f"'{part}" in refused(tmp_path / name, lambda p: read_state(dump, name))


@pytest.mark.parametrize("scheduler", ["cosine", "exponential", "onecycle", "steplr", "triangular2"])
def test_checkpoints_of_the_trainer_are_read(scheduler, settings, tools):
    trainer = tools.build(settings, scheduler=scheduler, nan_inject="1:loss")
    for batch in tools.batches(trainer)[:2]:
        trainer.progress.batch += 1
        trainer.train_step([batch])
    trainer.saver.last()
    trainer.close()
    path = trainer.files.model / "last.model"
    assert content_hash(read_checkpoint(path)) == content_hash(torch.load(path, weights_only=True))
    (dump,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert "is a checkpoint (the dumps of a run are nan_*.pt in debug_nan/ of its save_path), not a dump" in refused(
        path
    )
    shared = dump.with_name(read_dump(dump)["state"])
    assert "is the state that dumps beside it share (give one of nan_*.pt), not a dump" in refused(shared)
    state = read_state(dump, shared.name)
    assert state["model_state_dict"].keys() == trainer.network.state_dict().keys()


def test_other_checkpoints_are_read(tmp_path):
    path = tmp_path / "model000000001.model"
    weights = torch.nn.BatchNorm1d(3).state_dict()  # an OrderedDict with an attribute
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.zeros(1)], 0.1), [3, 5]).state_dict()
    torch.save({"model": weights, "tied": weights["weight"], "scheduler": schedule}, path)
    assert "is a checkpoint" in refused(path)
    read = read_checkpoint(path)
    assert type(read["model"]) is dict and read["model"]["weight"].data_ptr() == read["tied"].data_ptr()
    assert read["scheduler"]["milestones"] == {3: 1, 5: 1} and read["scheduler"]["last_epoch"] == 0
    torch.save(weights, path)
    assert "is a checkpoint" in refused(path)
    of_pickle(Call(collections.OrderedDict, (), {"items": 1, "keys": 2}, None, iter([("a", 3)])))(path)
    assert read_checkpoint(path) == {"a": 3}  # though it has an attribute where its method should be
    torch.save([1], path)
    assert "holds a list, not a checkpoint" in refused(path, read_checkpoint)
