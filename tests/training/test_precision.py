"""Which type mixed precision computes in, on processors with and without instructions for 16 bit."""

import os
from types import SimpleNamespace

import pytest
import torch
import yaml

from config import Config
from settings.reader import load_config
from training import precision
from training.precision import LossScaler

CPU = torch.device("cpu")
INFO = {
    "AVX2": "processor\t: 0\nflags\t\t: fpu sse2 avx avx2 f16c\n",
    "Zen 4": "flags\t\t: avx2 avx512f avx512_bf16\n",
    "Sapphire Rapids": "flags\t\t: avx512f avx512_bf16 avx512_fp16 amx_bf16\n",
    "Graviton 3": "processor\t: 0\nFeatures\t: fp asimd fphp asimdhp sve bf16 i8mm\n",
    "not told": "processor\t: 0\n",
}


@pytest.fixture
def processor(tmp_path, monkeypatch):
    def choose(name):
        (tmp_path / "cpuinfo").write_text(INFO[name])
        monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")

    return choose


@pytest.mark.parametrize("name, has", [(n, n in ("Zen 4", "Sapphire Rapids", "Graviton 3")) for n in INFO])
def test_auto_computes_in_bfloat16_only_where_the_processor_does(processor, name, has):
    processor(name)
    config = SimpleNamespace(mixedprec=True, amp_dtype="auto")
    assert precision.choose_amp_dtype(config, CPU) is (torch.bfloat16 if has else None)
    assert bool(precision.emulation_note(config, CPU)) is not has


def test_an_emulated_type_that_is_asked_for_is_used_and_its_price_said(processor):
    processor("AVX2")
    config = SimpleNamespace(mixedprec=True, amp_dtype="bfloat16")
    assert precision.choose_amp_dtype(config, CPU) is torch.bfloat16
    assert "only emulates bfloat16: a step takes up to 16 times as long" in precision.emulation_note(config, CPU)
    processor("Zen 4")
    assert precision.emulation_note(config, CPU) == ""
    config = SimpleNamespace(mixedprec=True, amp_dtype="float16")
    assert "only emulates float16" in precision.emulation_note(config, CPU)
    processor("AVX2")
    assert precision.emulation_note(SimpleNamespace(mixedprec=False, amp_dtype="auto"), CPU) == ""


def test_a_gpu_without_bfloat16_takes_float16(monkeypatch):
    config = SimpleNamespace(mixedprec=True, amp_dtype="auto")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert precision.choose_amp_dtype(config, torch.device("cuda")) is torch.float16
    assert precision.emulation_note(config, torch.device("cuda")) == ""
    config.amp_dtype = "bfloat16"
    assert "auto computes in float16 here" in precision.emulation_note(config, torch.device("cuda"))


def test_a_dump_names_the_type_that_was_computed_in(processor, settings, tools):
    from storage.dump import read_dump

    processor("AVX2")
    trainer = tools.build(settings, mixedprec="true", nan_inject="1:data")
    batch = tools.batches(trainer)[0]
    trainer.progress.batch = 1
    assert not trainer.accept(batch)
    trainer.incidents.writer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_batch_*.pt")
    assert read_dump(path)["amp_dtype"] == "float32"


def test_no_shipped_configuration_asks_for_a_type_by_name(tools):
    for path in (tools.root / "configs").rglob("*.yaml"):
        keys = yaml.safe_load(path.read_text())
        assert "amp_dtype" not in keys, path
    assert load_config(["--config", "configs/small_speech.yaml"])[0].mixedprec


def test_deterministic_sets_every_switch(kernels):
    precision.choose_kernels(Config(deterministic=True))
    assert kernels.deterministic and not kernels.benchmark and torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    precision.choose_kernels(Config())
    assert not kernels.deterministic and kernels.benchmark and not torch.are_deterministic_algorithms_enabled()


def test_evaluations_are_exact_whatever_training_computes_in(kernels):
    precision.choose_kernels(Config(float32_matmul="medium"))
    with precision.without_tf32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not (kernels.allow_tf32 or kernels.benchmark)
    assert torch.get_float32_matmul_precision() == "medium" and kernels.benchmark


def test_an_overflow_is_retried_down_to_the_floor_of_the_loss_scale():
    """Below 2^-126 its reciprocal would overflow, and sound gradients with it."""
    scaler = LossScaler(True)
    scaler.scale = 4 * LossScaler.FLOOR
    assert scaler.retries() == [2 * LossScaler.FLOOR, LossScaler.FLOOR] and scaler.lowest() == LossScaler.FLOOR
    scaler.scale = LossScaler.FLOOR
    assert scaler.retries() == [] and scaler.lowest() == LossScaler.FLOOR
