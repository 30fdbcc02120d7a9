"""The file of enrolled speakers: round trip, refusals, crashes while it is written, two writers at once."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from programs import ROOT
from samples import MODEL, heard, rows

from config import Config
from errors import UsageError
from storage.identity import identity_of
from storage.speaker_store import SpeakerStore, locked


def embeddings(store, name):
    return np.stack([utterance.embedding for utterance in store.utterances(name)])


@pytest.fixture
def path(tmp_path):
    """A store of two speakers."""
    store = SpeakerStore.open(tmp_path / "speakers.npz", MODEL, 5, create=True)
    store.add("ann", heard(rows(2), "a1.wav", "a2.wav"))
    store.add("bob van dyck", heard(rows(1, 1), "b.wav"))
    store.save()
    return store.path


def test_what_was_enrolled_comes_back(path):
    store = SpeakerStore.open(path, MODEL, 5)
    assert list(store.speakers) == ["ann", "bob van dyck"]
    assert np.array_equal(embeddings(store, "ann"), rows(2))
    assert [(u.seconds, u.source) for u in store.utterances("ann")] == [(1.5, "a1.wav"), (2.5, "a2.wav")]
    store.add("ann", heard(rows(1, 2), "a3.wav"))
    store.remove("bob van dyck")
    store.save()
    again = SpeakerStore.open(path, MODEL, 5)
    assert list(again.speakers) == ["ann"] and np.array_equal(
        embeddings(again, "ann"), np.vstack([rows(2), rows(1, 2)])
    )
    assert path.stat().st_mode & 0o777 == 0o600
    again.add("ann", heard(rows(1, 3), "a1.wav"), replace=True)
    assert np.array_equal(embeddings(again, "ann"), rows(1, 3))


def test_refusals(path):
    with pytest.raises(UsageError, match="another model"):
        SpeakerStore.open(path, "cd" * 32, 5)
    with pytest.raises(UsageError, match="size 5, the model gives 6"):
        SpeakerStore.open(path, MODEL, 6)
    with pytest.raises(UsageError, match=r"no such file.*enroll\.py makes it"):
        SpeakerStore.open(path.with_name("other.npz"), MODEL, 5)
    store = SpeakerStore.open(path, MODEL, 5)
    with pytest.raises(UsageError, match=r"a1\.wav: 'ann' is already enrolled"):
        store.add("ann", heard(rows(1), "a1.wav"))
    with pytest.raises(UsageError, match=r"a1\.wav: given twice for 'ann'; a recording counts once"):
        store.add("ann", heard(rows(2), "a1.wav", "a1.wav"), replace=True)
    with pytest.raises(UsageError, match="'eve' is not enrolled; enrolled: ann, bob van dyck"):
        store.remove("eve")
    for number in range(10):
        store.add(f"p{number}", heard(rows(1), f"{number}.wav"))
    with pytest.raises(UsageError, match=r"enrolled: ann, bob van dyck, p0, .*, p7, \.\. \(12 in all\)"):
        store.remove("eve")
    with pytest.raises(ValueError, match="finite"):
        store.add("eve", heard(np.full((1, 5), np.nan), "e.wav"))
    for name in ("eve\n", "ann\0", "e\x1b[2Jve", " ", "e" * 201):  # numpy drops "\0": "ann" would be there twice
        with pytest.raises(UsageError, match="line break") as refused:
            store.add(name, heard(rows(1), "e.wav"))
        assert str(refused.value).isprintable()


def test_damaged_files_are_one_line(path):
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    for trial in range(150):
        broken = bytearray(whole)
        if trial % 3 == 0:
            broken = broken[: rng.integers(len(whole))]
        else:
            for place in rng.integers(0, len(whole), trial % 3 * 4):
                broken[place] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        try:  # a flip may fall on a name or leave all as it was
            SpeakerStore.open(path, MODEL, 5)
        except UsageError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="damaged"):
        SpeakerStore.open(path, MODEL, 5)
    np.savez(path, speakers=np.array([{"a": 1}], dtype=object))  # pickle inside
    with pytest.raises(UsageError, match="damaged"):
        SpeakerStore.open(path, MODEL, 5)


CHILD = """
import os, sys
sys.path.insert(0, {root!r})
import numpy as np
from storage.speaker_store import SpeakerStore, Utterance, locked
with locked({path!r}):
    store = SpeakerStore.open({path!r}, {model!r}, 5, create=True)
    store.add({name!r}, [Utterance(np.ones(5, np.float32), 1.0, "x.wav")])
    {before}
    store.save()
"""


def child(path, name, before="pass"):
    code = CHILD.format(root=str(ROOT), path=str(path), model=MODEL, name=name, before=before)
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_it_is_written_leaves_the_old_store(path, call):
    process = child(path, "eve", f"os.{call} = lambda *a: os.kill(os.getpid(), 9)")
    assert process.wait(60) == -signal.SIGKILL
    assert list(SpeakerStore.open(path, MODEL, 5).speakers) == ["ann", "bob van dyck"]
    assert child(path, "eve").wait(60) == 0  # the lock of the dead process is gone
    assert list(SpeakerStore.open(path, MODEL, 5).speakers) == ["ann", "bob van dyck", "eve"]


def test_writers_at_once_lose_nobody(path):
    processes = [child(path, f"speaker {i}", "import time; time.sleep(0.2)") for i in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    assert len(SpeakerStore.open(path, MODEL, 5)) == 6


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        SpeakerStore.open(tmp_path / ("x" * 400), MODEL, 5)
    with pytest.raises(UsageError, match="cannot write beside"), locked(tmp_path / "none" / "speakers.npz"):
        pass
    store = SpeakerStore.open(tmp_path / "none" / "speakers.npz", MODEL, 5, create=True)
    with pytest.raises(UsageError, match="cannot be written"):
        store.save()


def test_a_model_of_bfloat16_has_an_identity():
    config = Config(model="ECAPA_TDNN")
    whole = torch.linspace(0, 1, 6)[:, None].expand(6, 2).T  # of no contiguous rows, and with a number that has none
    weights = {"__S__.a": whole, "__S__.b": torch.tensor(0.5)}
    coarse = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert identity_of(weights, config) != identity_of(coarse, config) == identity_of(coarse, config)
    copied = {name: tensor.contiguous() for name, tensor in weights.items()}
    assert identity_of(copied, config) == identity_of(weights, config)
