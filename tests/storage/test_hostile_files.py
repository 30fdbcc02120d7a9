"""A file that anyone may have written runs nothing, and asks for no memory that its size does not pay for."""

import asyncio
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from samples import MODEL, heard, rows

from corpus.lists import read_train_list
from corpus.tars import INDEX, write_index
from errors import UsageError
from scoring.backend import Backend
from scoring.files import read_scores
from serve import Guard
from settings.reader import load_config, read_yaml, to_yaml
from storage import checkpoint
from storage.arrays import write_arrays
from storage.embedding_files import read_embeddings, write_embeddings
from storage.files import write_atomically
from storage.speaker_store import SpeakerStore

MOST = 32 << 20  # bytes that refusing a small file may take


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refusal(read, path) -> str:
    """The one line that reading a file gives, without much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UsageError) as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def open_store(path):
    return SpeakerStore.open(path, "", 0)


# ------------------------------------------------------------------------------------------------------- embeddings


def entry(kind: bytes, *sizes, values=b""):
    return b"a \0B" + kind + b" " + b"".join(b"\4" + struct.pack("<i", size) for size in sizes) + values


ARKS = {
    "pickle": (b"a PKL" + pickle.dumps(Call(os.system, "touch ran")), "ark.ark"),
    "pickle in a binary entry": (b"a \0BPKL" + pickle.dumps(Call(os.system, "touch ran")), "b'PKL'"),
    "numpy": (b"a NPY" + b"\x93NUMPY", "numbers in brackets"),
    "long": (entry(b"FV", 2**31 - 1, values=bytes(40)), "beyond the end"),
    "large": (entry(b"DM", 2**31 - 1, 2**31 - 1, values=bytes(40)), "beyond the end"),
    "negative": (entry(b"FM", -1, -4, values=bytes(16)), "beyond the end"),
    "compressed": (entry(b"CM", 4), "an entry of kind b'CM '"),
    "rows": (entry(b"FM", 2, 2, values=bytes(16)), "'a' is a matrix of 2 rows, not one embedding"),
    "name only": (b"abc", "ends with a name"),
    "no name": (b"\0" * 9000, "without a name"),
    "open bracket": (b"a [ 1 2\n3 4\n", "numbers in brackets"),
    "words": (b"a [ 1 two ]\n", "two"),
}


@pytest.mark.parametrize("case", ARKS)
def test_an_ark_runs_no_code_and_takes_no_memory_it_does_not_fill(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, said = ARKS[case]
    (tmp_path / "ark.ark").write_bytes(content)
    (tmp_path / "e.scp").write_text(f"a {tmp_path / 'ark.ark'}:2\n")
    assert said in refusal(read_embeddings, tmp_path / "ark.ark")
    if case not in ("name only", "no name"):
        assert "e.scp:1: " in refusal(read_embeddings, tmp_path / "e.scp")
    assert not (tmp_path / "ran").exists()


def test_kaldi_files_are_read_as_kaldi_and_kaldiio_write_them(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    names = ["a", "é", os.fsdecode(b"caf\xe9")]
    write_embeddings(tmp_path / "e.ark", names, x)
    for file in ("e.ark", "e.scp"):
        assert read_embeddings(tmp_path / file)[0] == names
        assert np.array_equal(read_embeddings(tmp_path / file)[1], x)
    matrix = entry(b"DM", 1, 5, values=x[0].astype("<f8").tobytes())
    text = b"b  [ " + b" ".join(repr(float(v)).encode() for v in x[1]) + b" ]\nc  [\n  "
    (tmp_path / "t.ark").write_bytes(matrix + text + b" ".join(repr(float(v)).encode() for v in x[2]) + b" ]\n")
    assert read_embeddings(tmp_path / "t.ark")[0] == ["a", "b", "c"]
    assert np.array_equal(read_embeddings(tmp_path / "t.ark")[1], x)
    kaldiio = pytest.importorskip("kaldiio")
    write_embeddings(tmp_path / "o.ark", ["a", "é", "c"], x)
    assert all(np.array_equal(row, x[i]) for i, (_, row) in enumerate(kaldiio.load_ark(str(tmp_path / "o.ark"))))
    kaldiio.save_ark(str(tmp_path / "k.ark"), {"a": x[0], "b": x[1].astype(np.float64)}, scp=str(tmp_path / "k.scp"))
    for file in ("k.ark", "k.scp"):
        assert np.array_equal(read_embeddings(tmp_path / file)[1], x[:2])


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_crash_between_an_ark_and_its_places_leaves_no_names_of_others(replaced, tmp_path, monkeypatch):
    """The old list would give the embeddings of the new file the names of the old one."""
    x, replace, calls = np.arange(8, dtype=np.float32).reshape(2, 4), os.replace, []
    write_embeddings(tmp_path / "e.ark", ["a", "b"], x)

    def crash(*paths):
        calls.append(paths)
        if len(calls) > replaced:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr("storage.files.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(tmp_path / "e.ark", ["c", "d"], -x)
    names, found = read_embeddings(tmp_path / "e.ark")
    assert (names, found.tolist()) == ((["c", "d"], (-x).tolist()) if replaced else (["a", "b"], x.tolist()))
    assert not (tmp_path / "e.scp").exists()


def write_npz(path, header: dict, content: bytes, packed=zipfile.ZIP_STORED, names=("embeddings",)):
    text = repr({"descr": "<f4", "fortran_order": False, "shape": (1, 4), **header}).encode()
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name in names:
            archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content)


NPZS = {
    "promises": ({"shape": (1 << 40, 4)}, bytes(16), zipfile.ZIP_STORED, "another size than its header says"),
    "overflows": ({"shape": (1 << 62, 1 << 62)}, bytes(16), zipfile.ZIP_STORED, "another size than its header says"),
    "wide letters": ({"descr": "<U400000000", "shape": (1,)}, b"", zipfile.ZIP_STORED, "another size than its header"),
    "objects": ({"descr": "|O", "shape": ()}, pickle.dumps(Call(os.system, "touch ran")), 0, "Python objects"),
    "bomb": ({"shape": (1, 1 << 26)}, bytes(1 << 28), zipfile.ZIP_DEFLATED, "more than 16 times its size"),
}


@pytest.mark.parametrize("case", NPZS)
def test_an_npz_file_runs_no_code_and_unpacks_to_no_more_than_it_pays_for(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, content, packed, said = NPZS[case]
    path = tmp_path / "e.npz"
    names = ("names", "embeddings", "header", "speakers", "owner", "seconds", "sources", "identity", "format_version")
    write_npz(path, header, content, packed, names if len(content) < 1000 else names[:1])
    del content
    assert said in refusal(read_embeddings, path)
    assert "damaged" in refusal(open_store, path)
    assert "damaged" in refusal(Backend.load, path)
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------- speakers and back-ends


def test_a_source_of_many_letters_does_not_grow_the_store(tmp_path):
    store = SpeakerStore.open(tmp_path / "s.npz", MODEL, 5, create=True)
    with pytest.raises(UsageError, match="more than 4096 letters"):
        store.add("ann", heard(rows(1), "x" * 8000))
    store.add("ann", heard(rows(1), "x" * 4096))
    for i in range(200):
        store.add(f"speaker {i}", heard(rows(5), *(f"{j}.wav" for j in range(5))))
    store.save()
    assert store.path.stat().st_size < 100_000  # 16 MB, were each source as wide as the longest
    again = SpeakerStore.open(store.path, MODEL, 5)
    assert len(again) == 201 and again.utterances("ann")[0].source == "x" * 4096


def test_stores_of_before_are_read(tmp_path):
    texts = {"speakers": np.array(["ann", "bob"]), "sources": np.array(["a.wav", "b.wav", "c.wav"])}
    numbers = {"owner": np.array([0, 1, 1]), "embeddings": rows(3), "seconds": np.ones(3)}
    write_arrays(tmp_path / "s.npz", format_version=np.int64(1), identity=np.str_(MODEL), **texts, **numbers)
    store = SpeakerStore.open(tmp_path / "s.npz", MODEL, 5)
    assert [u.source for u in store.utterances("bob")] == ["b.wav", "c.wav"]
    store.save()
    assert list(SpeakerStore.open(tmp_path / "s.npz", MODEL, 5).speakers) == ["ann", "bob"]


def test_json_of_other_shapes_is_refused(tmp_path):
    deep = {"speakers": b"[" * 100_000, "sources": b'["a"]'}
    wrong = {"speakers": b'["a"]', "sources": b'[{"a": 1}]'}
    numbers = {"owner": np.array([0]), "embeddings": rows(1), "seconds": np.ones(1)}
    for texts in (deep, wrong):
        texts = {key: np.bytes_(text) for key, text in texts.items()}
        write_arrays(tmp_path / "s.npz", format_version=np.int64(2), identity=np.str_(MODEL), **texts, **numbers)
        assert "damaged" in refusal(open_store, tmp_path / "s.npz")
    (tmp_path / "b.json").write_text(json.dumps({"calibration": 1}) + "9" * 10_000)
    assert "damaged" in refusal(Backend.load, tmp_path / "b.json")


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old form"])
@pytest.mark.parametrize("function", [os.system, bytearray, torch.Tensor])
def test_a_checkpoint_calls_nothing_and_asks_for_no_memory(function, new, tmp_path):
    path = tmp_path / "x.model"
    argument = f"touch {tmp_path / 'ran'}" if function is os.system else 1 << 40
    torch.save({"x": Call(function, argument)}, path, _use_new_zipfile_serialization=new)
    assert "restricted loading" in refusal(checkpoint.load, path) and not (tmp_path / "ran").exists()


def test_a_checkpoint_whose_tensors_are_larger_than_the_file_is_refused(tmp_path):
    path = tmp_path / "x.model"
    for new in (True, False):
        torch.save({"x": torch.zeros(5)}, path, _use_new_zipfile_serialization=new)
        five, many = b"K\5", b"J" + struct.pack("<i", 2**31 - 1)
        content = path.read_bytes()
        if new:  # as a new archive, whose checksums fit
            with zipfile.ZipFile(path) as old:
                parts = {name: old.read(name).replace(five, many) for name in old.namelist()}
            with zipfile.ZipFile(path, "w") as archive:
                for name, part in parts.items():
                    archive.writestr(name, part)
        else:
            path.write_bytes(content.replace(five, many))
        assert "storage" in refusal(checkpoint.load, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\2}.")
        archive.writestr("archive/data/0", bytes(1 << 26))
    assert "is compressed" in refusal(checkpoint.load, path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old form"])
def test_what_checkpoints_of_others_hold_is_read(new, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = {"model": module.state_dict(), "parameter": torch.nn.Parameter(torch.ones(2)), "shape": torch.Size([2])}
    state |= {"type": torch.float16, "device": torch.device("cpu"), "view": torch.arange(9)[3:5], "name": "caf\udce9"}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    loaded = checkpoint.load(tmp_path / "x.pt")
    assert list(loaded) == list(state) and loaded["view"].tolist() == [3, 4] and loaded["name"] == "caf\udce9"
    assert torch.equal(loaded["model"]["0.weight"], module[0].weight)


# ------------------------------------------------------------------------------------------------- YAML and lists

YAMLS = {
    "brackets": ("x: " + "[" * 10_000, ":2: not valid YAML: nested more than 32 deep"),
    "braces": ("x: " + "{a: " * 10_000, ":2: not valid YAML: nested more than 32 deep"),
    "dashes": ("x:\n " + "- " * 10_000, ":3: not valid YAML: nested more than 32 deep"),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", ":3: not valid YAML: an alias of a list or mapping"),
    "merged": ("a: &a {x: 1}\nb: {<<: [*a, *a]}", ":3: not valid YAML: an alias of a list or mapping"),
    "itself": ("a: &a [*a]", ":2: not valid YAML: an alias of a list or mapping"),
    "number": ("batch_size: 0x" + "f" * 9000, ":2: not valid YAML: a number beyond 64 bits"),
    "code": ("a: !!python/object/apply:os.system ['touch ran']", ":2: not valid YAML: could not determine"),
    "length": ("a: " + "x" * (1 << 20), ": longer than 1048576 characters"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_a_configuration_is_no_deeper_and_no_larger_than_it_looks(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, said = YAMLS[case]
    (tmp_path / "x.yaml").write_text("lr: &lr 0.1\n" + text)
    assert refusal(read_yaml, tmp_path / "x.yaml").startswith(f"{tmp_path / 'x.yaml'}{said}")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UsageError, match="unknown key"):  # on the command line it is but a text
        load_config([f"--x={text}"])


def test_an_alias_of_a_number_still_works(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: &lr 0.1\nmargin: *lr\n")
    assert read_yaml(tmp_path / "x.yaml")["margin"].value == 0.1


def test_a_configuration_that_was_written_is_read(tmp_path):
    sizes = [1, [2, 3]]
    values = {"a": sizes, "b": sizes, "path": "caf\udce9", "name": "名前", "lr": 1e-5}
    (tmp_path / "x.yaml").write_text(to_yaml(values), encoding="utf-8")
    assert {key: setting.value for key, setting in read_yaml(tmp_path / "x.yaml").items()} == values


def test_what_is_no_text_is_no_list(tmp_path):
    (tmp_path / "list").write_bytes("ann a.wav\n".encode("utf-16"))
    assert "not a UTF-8 text file" in refusal(read_train_list, tmp_path / "list")
    assert "not a UTF-8 text file" in refusal(read_scores, tmp_path / "list")


# -------------------------------------------------------------------------------------------------------- the page


def ask(hosts, path="/api/speakers", **headers) -> int:
    """Status of a request that reaches the page's guard."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "DELETE", "path": path, "headers": pairs}
    asyncio.run(Guard(app, hosts, 1 << 20)(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.skipif(os.name == "nt", reason="links need a right of their own there")
def test_a_link_under_the_name_of_a_file_that_is_being_written_leads_nowhere(tmp_path):
    """Who may write into a shared folder can guess that name; the file it leads to is not his to write over."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for temporary in (f".new.json.{os.getpid()}.tmp", f"a.tar{INDEX}.{os.getpid()}.tmp"):
        (tmp_path / temporary).symlink_to(victim)
    write_atomically(tmp_path / "new.json", b"{}")
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16000)
    (tmp_path / "a.spk").write_text("ann")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.wav", "a.spk"):
            tar.add(tmp_path / name, name)
    write_index(str(tmp_path / "a.tar"), "a.tar", ((tmp_path / "a.tar").stat().st_size, 0))
    assert victim.read_text() == "precious" and (tmp_path / "new.json").read_bytes() == b"{}"
    assert not (tmp_path / "new.json").is_symlink() and not list(tmp_path.glob("*.tmp"))


def test_a_name_that_another_site_points_here_reaches_no_speaker():
    hosts = {"localhost", "0.0.0.0", "studio.lan"}
    for own in ("localhost:8000", "127.0.0.1", "192.168.1.7:8000", "[::1]:8000", "[fe80::1]", "Studio.LAN:8000"):
        assert ask(hosts, host=own) == 200, own
        assert ask(hosts, host=own, origin=f"http://{own}") == 200, own
        assert ask(hosts, host=own, origin="http://evil.example") == 403
        assert ask(hosts, host=own, origin="null") == 403
        assert ask(hosts, host=own, sec_fetch_site="cross-site") == 403
    assert ask(hosts, path="/", host="localhost", sec_fetch_site="cross-site") == 200  # a link to the page
    for other in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        "[::1",
        "::1",
    ):
        assert ask(hosts, host=other) == 421, other
        assert ask(hosts, host=other, origin=f"http://{other}") == 421, other
    assert ask(hosts) == 421
