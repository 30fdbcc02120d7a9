"""Recordings that memory is too small for: embedded in windows, or named and left out."""

import math
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch

import embed
import verify
from corpus.audio import decibels, wrap_pad
from corpus.windows import Replicas, batches_at_once, embed_rows, embed_windows, in_order
from DatasetLoader import TestDataset
from errors import UsageError
from settings.command_line import run
from speaker_model import SpeakerModel, load_model
from storage.embedding_files import read_embeddings
from storage.files import save_atomically

RATE = 16000
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you ...")
GPU = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.fixture
def model(settings, tools, tmp_path):
    """Checkpoint of a model, and the folder of a recording of 5 s among three of 1 s."""
    (tmp_path / "wav").mkdir()
    for name, seconds in (("a", 1), ("b", 1), ("long", 5), ("c", 1)):
        x = np.random.default_rng(seconds + ord(name[0])).normal(0, 0.1, seconds * RATE)
        soundfile.write(tmp_path / "wav" / f"{name}.wav", x, RATE)
    save_atomically(tools.build(settings).state.capture(), tmp_path / "x.model")
    return tmp_path / "x.model", tmp_path / "wav"


def small_memory(monkeypatch, error, most):
    """Let models fail on more than ``most`` seconds at once."""
    whole = SpeakerModel._forward

    def forward(self, x, network=None):
        if x.shape[0] * x.shape[1] > most * RATE:
            raise error
        return whole(self, x, network)

    monkeypatch.setattr(SpeakerModel, "_forward", forward)


def test_windows_cover_a_recording_and_share_a_quarter():
    for window, samples in ((100, 101), (100, 175), (100, 176), (100, 1000), (7, 1000)):
        parts = []

        def forward(x, parts=parts):
            parts.append(x)
            return x.sum(dim=1, keepdim=True)

        embed_windows(forward, torch.arange(float(samples))[None], window)
        assert all(part.shape == (1, window) for part in parts)
        starts = [int(part[0, 0]) for part in parts]
        assert starts[0] == 0 and starts[-1] == samples - window and max(np.diff(starts)) <= 0.75 * window + 1
    assert embed_windows(len, torch.zeros(2, 100), 100) == embed_windows(len, torch.zeros(2, 100), 0) == 2


def test_a_long_recording_has_the_mean_of_its_windows_and_a_short_one_is_as_before(model):
    network = load_model(model[0])
    whole = network.embed_file(model[1] / "long.wav")
    short = network.embed_file(model[1] / "a.wav")
    network.config.embed_window_seconds = 2.0
    assert np.array_equal(network.embed_file(model[1] / "a.wav"), short)
    x = soundfile.read(model[1] / "long.wav", dtype="float32")[0]
    parts = [network.embed(x[int(start * RATE) :][: 2 * RATE]) for start in (0, 1.5, 3)]
    windowed = network.embed_file(model[1] / "long.wav")
    assert np.allclose(windowed, np.mean(parts, axis=0), atol=1e-6) and not np.allclose(windowed, whole, atol=1e-4)


@pytest.mark.parametrize("error", [CPU, GPU, MemoryError()], ids=["CPU", "GPU", "numpy"])
def test_one_recording_that_memory_is_too_small_for_is_named_and_the_others_are_written(
    error, model, monkeypatch, tmp_path, capsys
):
    checkpoint, folder = model
    words = ["--initial_model", str(checkpoint), "--dir", str(folder), "--out", str(tmp_path / "e.npz")]
    assert run(embed.main, [*words, "--embed_window_seconds", "2"]) == 0
    names, all_four = read_embeddings(tmp_path / "e.npz")
    small_memory(monkeypatch, error, 4)
    assert run(embed.main, [*words, "--embed_window_seconds", "0"]) == 1
    said = capsys.readouterr().err
    reason = "needs more memory than there is (5 s); a smaller embed_window_seconds needs less"
    assert said == f"{folder / 'long.wav'}: {reason}\n"
    assert read_embeddings(tmp_path / "e.npz")[0] == ["a.wav", "b.wav", "c.wav"]
    assert run(embed.main, [*words, "--embed_window_seconds", "2"]) == 0
    again, x = read_embeddings(tmp_path / "e.npz")
    assert again == names == ["a.wav", "b.wav", "c.wav", "long.wav"] and np.array_equal(x, all_four)


def test_a_recording_that_leaves_no_memory_to_prepare_it_is_named_and_the_others_are_written(
    model, monkeypatch, tmp_path, capsys
):
    checkpoint, folder = model

    def scarce(x, samples):
        if len(x) > 4 * RATE:
            raise MemoryError("Unable to allocate 146. MiB")
        return wrap_pad(x, samples)

    monkeypatch.setattr("DatasetLoader.wrap_pad", scarce)
    words = ["--initial_model", str(checkpoint), "--dir", str(folder), "--out", str(tmp_path / "e.npz")]
    assert run(embed.main, [*words, "--workers", "0"]) == 1
    assert capsys.readouterr().err == f"{folder / 'long.wav'}: too long for the memory of this machine\n"
    assert read_embeddings(tmp_path / "e.npz")[0] == ["a.wav", "b.wav", "c.wav"]


def test_nothing_of_the_size_of_a_long_recording_is_copied_to_look_at_it(model):
    _, folder = model
    x = np.random.default_rng(1).normal(0, 0.1, 100 * RATE).astype(np.float32)
    soundfile.write(folder / "long.wav", x, RATE, subtype="FLOAT")
    level = 10 * math.log10(np.mean(x.astype(np.float64) ** 2))
    dataset = TestDataset(["long.wav"], str(folder), 0, 1, 32)
    tracemalloc.start()
    assert decibels(x) == pytest.approx(level, abs=1e-9)
    looked_at = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    _, audio, _ = dataset[0]
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert looked_at < 0.5 * x.nbytes and tuple(audio.shape) == (1, 1, len(x))
    assert read < 2.2 * x.nbytes, read / x.nbytes  # its blocks, and then their sequence


def test_a_batch_that_memory_is_too_small_for_is_embedded_one_by_one(model, monkeypatch, tmp_path, capsys):
    checkpoint, folder = model
    words = ["--initial_model", str(checkpoint), "--dir", str(folder), "--out", str(tmp_path / "e.npz")]
    small_memory(monkeypatch, CPU, 2)
    assert run(embed.main, [*words, "--embed_window_seconds", "2"]) == 0
    assert capsys.readouterr().err == "not enough memory to embed 3 waveforms of 1 s at once: one by one\n"
    assert len(read_embeddings(tmp_path / "e.npz")[0]) == 4


def test_other_errors_of_a_model_are_not_taken_for_a_lack_of_memory(model, monkeypatch):
    small_memory(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        load_model(model[0]).embed_files([model[1] / "long.wav"])


def test_a_recording_whose_numbers_a_model_refuses_is_a_row_of_nan(capsys):
    """As silence, of whose level one takes the logarithm: the others of its batch are embedded as alone."""

    def forward(x):
        return torch.stack([x.mean(dim=1), torch.full((len(x),), math.log10(x.abs().amax(dim=1).min()))], dim=1)

    x = torch.tensor([[0.5, 1.0], [0.0, 0.0], [2.0, 10.0]])
    for alone in (True, False):
        rows, reasons = embed_rows(forward, x, 0, 2, alone)
        assert rows[::2].tolist() == [[0.75, 0.0], [6.0, 1.0]] and bool(rows[1].isnan().all())
        assert list(reasons) == [1] and "ValueError: " in reasons[1] and "test_long_recordings.py:" in reasons[1]
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyError):
        embed_rows(lambda x: {}["a mistake"], x, 0, 2)


def test_verify_names_the_recording_that_is_too_long(model, monkeypatch, capsys):
    checkpoint, folder = model
    small_memory(monkeypatch, CPU, 4)
    words = [str(folder / "a.wav"), str(folder / "long.wav"), "--initial_model", str(checkpoint)]
    assert run(verify.main, words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{folder / 'long.wav'}: needs more memory than there is") and said.count("\n") == 1
    assert run(verify.main, [*words, "--embed_window_seconds", "2"]) == 0


def test_an_evaluation_goes_on_without_a_recording_that_is_too_long(settings, data, model, tools, tmp_path):
    trials = (data / "trials.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "trials.txt").write_text("\n".join([*trials, f"0 {model[1] / 'long.wav'} {trials[0].split()[1]}"]))
    trainer = tools.build({**settings, "test_list": str(tmp_path / "trials.txt"), "embed_window_seconds": 2.0})
    network = trainer.network
    assert trainer.evaluator.run(network, 1)["nan_scores"] == 0
    trainer.evaluator.window = 0
    whole = network.__S__.forward

    def forward(x):
        if x.shape[1] > 4 * RATE:
            raise CPU
        return whole(x)

    network.__S__.forward = forward
    result = trainer.evaluator.run(network, 1)
    assert result["nan_scores"] == 1 and result["failed"] is None and result["eer"] >= 0
    assert [file["path"] for file in result["nan_files"]] == [str(model[1] / "long.wav")]
    assert "needs more memory than there is (5 s)" in result["nan_files"][0]["reason"]


class Forgetful(torch.nn.Module):
    """A plug-in that keeps what it works on in an attribute, as a graph's tensor too."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.kept = self.weight * 2
        self.register_buffer("scratch", torch.zeros(2))

    def forward(self, x):
        self.kept = x * self.weight
        self.scratch.copy_(x)
        time.sleep(0.002)  # another thread writes meanwhile
        assert torch.equal(self.scratch, x)
        return self.kept


def test_a_network_that_keeps_values_in_attributes_is_embedded_with_by_several_threads(monkeypatch):
    network = Forgetful()
    cpu = torch.device("cpu")
    monkeypatch.setattr("corpus.windows.batches_at_once", lambda device: 3)
    replicas = Replicas(network, cpu)
    assert replicas.count == 3
    network.weight.data.fill_(3.0)  # they share weights that change between evaluations
    batches = [torch.full((2,), float(n)) for n in range(40)]
    with ThreadPoolExecutor(6) as pool:
        assert [out.tolist() for out in pool.map(replicas, batches)] == [[3.0 * n] * 2 for n in range(40)]
    network.lock = threading.Lock()  # cannot be copied
    alone = Replicas(network, cpu)
    assert alone.count == 1
    with ThreadPoolExecutor(3) as pool:
        assert [out[0].item() for out in pool.map(alone, batches[:9])] == [3.0 * n for n in range(9)]


def test_batches_embedded_at_the_same_time_come_in_order_and_leave_the_threads_as_they_were():
    threads, seen, together = torch.get_num_threads(), [], threading.Barrier(3, timeout=20)
    failure = UsageError("no more")

    def embed(batch, alone):
        seen.append(torch.get_num_threads())
        together.wait()  # breaks unless three are at work
        return 10 * batch

    torch.set_num_threads(6)
    try:
        pairs = list(in_order([1, 2, 3, 4, 5, 6, failure, failure], embed, 3))
        assert pairs == [*((n, 10 * n) for n in range(1, 7)), (failure, None), (failure, None)]
        assert seen == [2] * 6 and torch.get_num_threads() == 6
        assert list(in_order([1, failure], lambda batch, alone: -batch, 1)) == [(1, -1), (failure, None)]
        with pytest.raises(ZeroDivisionError):
            list(in_order([1, 0], lambda batch, alone: 1 / batch, 2))
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(threads)


def test_a_batch_that_has_no_room_beside_others_is_embedded_alone():
    room, busy, alone_with = threading.Semaphore(2), [], []

    def embed(batch, alone):
        if not room.acquire(blocking=False):
            raise MemoryError
        busy.append(batch)
        if alone:
            alone_with.append(len(busy))
        time.sleep(0.01)
        busy.remove(batch)
        room.release()
        return -batch

    assert list(in_order(range(30), embed, 5)) == [(n, -n) for n in range(30)]
    assert set(alone_with) == {1}


def test_threads_have_the_precision_that_was_chosen_for_all_of_them(model):
    checkpoint, folder = model
    paths = [folder / f"{name}.wav" for name in ("a", "b", "c", "long")]
    loaded, seen = load_model(checkpoint), []
    loaded.network.register_forward_pre_hook(lambda *a: seen.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("medium")
    try:
        loaded.embed_files(paths)
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "threads, batches", [(1, 1), (2, 2), (7, 7), (8, 8), (9, 4), (11, 5), (12, 6), (16, 8), (64, 8)]
)
def test_batches_at_once_leave_few_threads_idle(monkeypatch, threads, batches):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert batches_at_once(torch.device("cpu")) == batches
    assert batches_at_once(torch.device("cuda")) == 1
