"""Learning from a teacher: the losses, what a run with one leaves behind, and what is refused before it begins."""

import json
import math
import re
import shutil

import numpy as np
import programs
import pytest
import torch

import trainSpeakerNet
from errors import UsageError
from speaker_model import load_model
from storage import checkpoint
from training.distillation import distillation_of, embedding_loss, logit_loss, similarity_loss

LOSSES = {
    "embedding": lambda s, t: embedding_loss(s, t),
    "similarity": lambda s, t: similarity_loss(s, torch.cat([t, t[:, :2] ** 2], dim=1)),
    "logit": lambda s, t: logit_loss(5 * s, 5 * t, 3.0),
}


def words(keys, **more):
    return [f"--{key}={value}" for key, value in {**keys, **more}.items()]


def checkpoint_of(tools, settings, **keys):
    """The checkpoint of a model that has not been trained."""
    trainer = tools.build({**settings, "save_path": f"{settings['save_path']}_teacher", **keys})
    trainer.saver.last()
    return str(trainer.files.model / "last.model")


@pytest.fixture
def teacher(settings, tools):
    return checkpoint_of(tools, settings, channels=16, seed=5)


def pair(rows=6, size=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, size, dtype=torch.float64, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # cosine_matrix computes in fp32
    student, teacher = pair()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student.requires_grad_())


def test_losses_are_those_of_short_ones_in_numpy():
    student, teacher = (x.numpy() for x in pair())
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
    expected = np.mean([1 - a @ b for a, b in zip(*unit)])
    assert float(embedding_loss(*pair())) == pytest.approx(expected)
    rows = len(student)
    grams = [u @ u.T for u in unit]
    grams = [[np.delete(row, i) for i, row in enumerate(gram)] for gram in grams]
    grams = [np.array([row / np.linalg.norm(row) for row in gram]) for gram in grams]
    tung_and_mori = np.sum((grams[0] - grams[1]) ** 2) / rows**2
    assert float(similarity_loss(*pair())) == pytest.approx(rows / 2 * tung_and_mori, rel=1e-5)
    soft = [np.exp(x / 3) / np.exp(x / 3).sum(axis=1, keepdims=True) for x in (student, teacher)]
    divergence = np.mean((soft[1] * np.log(soft[1] / soft[0])).sum(axis=1))
    assert float(logit_loss(*pair(), 3.0)) == pytest.approx(9 * divergence)


def test_a_batch_of_one_row_has_no_similarities():
    student = torch.randn(1, 4, requires_grad=True)
    loss = similarity_loss(student, torch.randn(1, 8))
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_a_high_temperature_gives_gradients_of_the_same_size():
    """Hinton et al. 2015, section 2.1: for a high T the gradient is that of (z - v)^2 / 2 of centred logits."""
    student, teacher = pair()
    student.requires_grad_()
    logit_loss(student, teacher, 1e4).backward()
    centred = [x.detach() - x.detach().mean(dim=1, keepdim=True) for x in (student, teacher)]
    expected = (centred[0] - centred[1]) / student.shape[1] / len(student)
    assert torch.allclose(student.grad, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "logits", "both"])
def test_the_loss_of_a_step_is_that_of_its_parts(settings, tools, teacher, kind):
    keys = {"teacher_checkpoint": teacher, "distillation_type": kind, "distillation_alpha": 0.3}
    trainer = tools.build(settings, **keys)
    plain = tools.build({**settings, "save_path": f"{settings['save_path']}_plain"})
    network = plain.network
    assert all(map(torch.equal, network.state_dict().values(), trainer.network.state_dict().values()))
    (batch, *_) = tools.batches(trainer)
    taught = torch.load(teacher, weights_only=True)["model_state_dict"]
    model = load_model(teacher).network.__S__
    network.train()
    own, accuracy = network(batch["data"], batch["label"])
    embeddings = network.train().__S__(batch["data"][0])
    with torch.no_grad():
        wanted = model(batch["data"][0])
    told, heard = (
        30 * torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
        for x, w in ((wanted, taught["__L__.weight"]), (embeddings, network.loss.weight))
    )
    scale = trainer.config.scale
    told, heard = (x / 30 * scale / 4 for x in (told, heard))
    parts = {"cosine": 1 - torch.cosine_similarity(embeddings, wanted).mean()}
    parts["logits"] = 16 * (told.softmax(1) * (told.log_softmax(1) - heard.log_softmax(1))).sum(1).mean()
    parts["both"] = sum(parts.values())
    loss, same = trainer.network.train()(batch["data"], batch["label"])
    assert loss.item() == pytest.approx((0.3 * parts[kind] + 0.7 * own).item(), rel=1e-5)
    assert same.item() == accuracy.item()
    loss.backward()
    assert all(p.grad is not None for p in trainer.network.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in distillation_of(trainer.network).parameters())


def test_the_teacher_stays_as_it_is_and_out_of_everything(settings, tools, teacher, tmp_path):
    keys = {"teacher_checkpoint": teacher, "weight_decay": 0.1, "ema_decay": 0.9, "max_epoch": 1, "test_interval": 1}
    before = torch.load(teacher, weights_only=True)["model_state_dict"]
    trainer = tools.build(settings, **keys)
    taught, names = distillation_of(trainer.network), set(trainer.network.state_dict())
    trainer.begin()
    trainer.run()
    trainer.close()
    assert not taught.training and not taught.teacher.training
    after = taught.teacher.state_dict()
    assert all(torch.equal(after[n.removeprefix("__S__.")], t) for n, t in before.items() if n.startswith("__S__."))
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in taught.parameters()}
    best = checkpoint.load(tmp_path / "run" / "model" / "model_best.model")
    assert set(best["model_state_dict"]) == names and set(best["ema_state_dict"]["parameters"]) <= names
    assert list(best["teacher"]["files"]) == [teacher] and best["teacher"]["model"] == "ECAPA_TDNN"
    os_gone = tmp_path / "moved"
    (tmp_path / "run_teacher").rename(os_gone)  # the student is used without its teacher
    assert load_model(tmp_path / "run" / "model" / "model_best.model").dimension == 12
    words_of = words(settings, **keys, eval=True, initial_model=tmp_path / "run" / "model" / "model_best.model")
    assert trainSpeakerNet.main(words_of) == 0


VARIANTS = {
    "another size": {"nOut": 10},
    "mixup, accumulated": {"mixup": 0.5, "gradient_accumulation_steps": 2, "distillation_type": "both"},
    "bfloat16, late": {"mixedprec": True, "amp_dtype": "bfloat16", "nan_check": "late", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_equals_one_that_was_not_interrupted(settings, tools, teacher, keys, tmp_path):
    keys = {**settings, **keys, "teacher_checkpoint": teacher, "test_interval": 4, "max_epoch": 2}
    states = []
    for place, epochs in (("whole", [2]), ("parts", [1, 2])):
        for last in epochs:
            trainer = tools.build({**keys, "save_path": str(tmp_path / place)}, scheduler="steplr", max_epoch=last)
            trainer.begin()
            trainer.run()
            trainer.close()
        states.append(tools.snapshot(trainer))
    tools.assert_same(*states)


def test_rows_at_fault_are_those_that_only_the_teacher_spoils(settings, tools, teacher):
    keys = {"teacher_checkpoint": teacher, "gradient_accumulation_steps": 2, "nan_recheck": "none"}
    trainer = tools.build(settings, **keys)
    taught, (first, second, *_) = distillation_of(trainer.network), tools.batches(trainer)
    spoilt = []

    def spoil(module, inputs, output):  # row 1 of the first batch, row 2 of the second
        spoilt.append(output.clone())
        spoilt[-1][len(spoilt)] = math.nan
        return spoilt[-1]

    with taught.teacher.register_forward_hook(spoil):
        fault = trainer.step.take([first, second])
    assert fault.rows == [1, len(first["label"]) + 2] and fault.module == "distillation.teacher"
    hook = trainer.network.__S__.register_forward_hook(lambda *call: call[2] * math.nan)
    with hook, taught.teacher.register_forward_hook(lambda *call: call[2] * math.nan):
        fault = trainer.step.take([first, second])
    assert fault.rows == [] and fault.what == "loss is nan"


def test_several_utterances_a_row(settings, tools):
    keys = {**settings, "trainfunc": "softmaxproto", "nPerSpeaker": 2}
    path = checkpoint_of(tools, keys, channels=16)
    trainer = tools.build(keys, teacher_checkpoint=path, distillation_type="both", distillation_alpha=1)
    (batch, *_) = tools.batches(trainer)
    flat = batch["data"].reshape(-1, batch["data"].shape[-1])
    taught, network = distillation_of(trainer.network), trainer.network.train()
    loss, _ = network(batch["data"], batch["label"])
    embeddings, wanted = network.__S__(flat), taught.teacher(flat)
    logits = [head.softmax.fc(x) for head, x in ((network.loss, embeddings), (taught.classifier, wanted))]
    expected = embedding_loss(embeddings, wanted) + logit_loss(*logits, 4.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_processes_take_the_steps_of_one(settings, tools, teacher, write, tmp_path):
    losses = []
    for place, world in (("one", 1), ("two", 2)):
        keys = {**settings, "teacher_checkpoint": teacher, "save_path": str(tmp_path / place), "max_epoch": 1}
        keys |= {"sync_batchnorm": True, "batch_size": 12 // world, "log_interval": 1, "lr": 0.002}
        done = programs.run_ranks(tools.root / "trainSpeakerNet.py", "--config", write(keys), world=world)
        assert [process.returncode for process in done] == [0] * world, done[0].stderr
        events = map(json.loads, (tmp_path / place / "result" / "metrics.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if event["event"] == "step"])
    assert len(losses[0]) > 1 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_preflight_looks_at_the_pair(settings, teacher, capsys, tmp_path):
    assert trainSpeakerNet.main(words(settings, teacher_checkpoint=teacher, nOut=10, preflight=True)) == 0
    told = capsys.readouterr().out
    assert f"teacher {teacher}: ECAPA_TDNN (" in told and "(of 12 and 10 values: by the similarities" in told


def test_the_resolved_configuration_names_the_teacher(settings, teacher, capsys):
    assert trainSpeakerNet.main([*words(settings, teacher_checkpoint=teacher), "--print_config"]) == 0
    told = capsys.readouterr().out
    assert "teacher_model: ECAPA_TDNN\n" in told and "distillation_temperature: 4.0\n" in told


# ------------------------------------------------------------------------------------- teachers of every kind


def test_a_teacher_without_configuration_has_the_keys_of_the_run(settings, tools, tmp_path):
    state = torch.load(checkpoint_of(tools, settings, seed=5), weights_only=True)
    bare = tmp_path / "bare.model"
    torch.save({f"module.{name}": t for name, t in state["model_state_dict"].items()}, bare)
    trainer = tools.build(settings, teacher_checkpoint=bare, teacher_model="ECAPA_TDNN")
    assert trainer.config.teacher_model == "ECAPA_TDNN"
    with pytest.raises(UsageError, match=r"--teacher_checkpoint: .*bare.model carries no configuration; give teacher_"):
        tools.build(settings, teacher_checkpoint=bare)
    with pytest.raises(UsageError, match=r"teacher_checkpoint: .*: [0-9]+ of [0-9]+ tensors of ECAPA_TDNN match"):
        tools.build(settings, teacher_checkpoint=bare, teacher_model="ECAPA_TDNN", n_mels=30)


def test_a_checkpoint_of_another_toolkit_teaches_by_its_configuration(settings, tools, write, tmp_path):
    from models.ResNet import MainModel

    torch.manual_seed(0)
    keys = {"depth": 34, "m_channels": 4, "blocks": [1, 1, 1, 1], "n_mels": 40, "pooling": "TSTP"}
    model = MainModel(nOut=12, **keys)
    path = tmp_path / "avg_model.pt"
    torch.save({**model.state_dict(), "projection.weight": torch.randn(3, 12)}, path)
    with pytest.raises(UsageError, match=r"avg_model.pt: is a checkpoint of wespeaker .*give teacher_config"):
        tools.build(settings, teacher_checkpoint=path)
    yaml = write({"model": "ResNet", "nOut": 12, **keys})
    trainer = tools.build(settings, teacher_checkpoint=path, teacher_config=yaml)
    waves = 0.1 * torch.randn(2, 8000)
    with torch.no_grad():
        assert torch.equal(distillation_of(trainer.network).teacher(waves), model.eval()(waves))
    with pytest.raises(UsageError, match="does not say which speakers its classes are; distillation_type: cosine"):
        tools.build(settings, teacher_checkpoint=path, teacher_config=yaml, distillation_type="logits")


REFUSED = {
    "no weights": ({"teacher_checkpoint": "", "teacher_model": "ECAPA_TDNN"}, "teacher_model: a teacher needs its"),
    "no file": ({"teacher_checkpoint": "nothing.model"}, "teacher_checkpoint: no such file: 'nothing.model'"),
    "no configuration file": ({"teacher_config": "nothing.yaml"}, "teacher_config: no such file: 'nothing.yaml'"),
    "another model": ({"teacher_model": "XVector"}, "--teacher_model: XVector, but .* is of ECAPA_TDNN; leave teacher"),
    "no model": ({"teacher_model": "Nobody"}, "--teacher_model: no plug-in 'models/Nobody.py'"),
    "training along": ({"freeze_teacher": False}, "--freeze_teacher: false: a teacher that trains along"),
    "no weight": ({"distillation_alpha": 0}, "--distillation_alpha: .*above 0"),
    "cold": ({"distillation_temperature": 0}, "--distillation_temperature: .*above 0"),
    "a type of the fork": ({"distillation_type": "kl"}, "--distillation_type: .*cosine.*logits.*both"),
    "rate": ({"sample_rate": 8000}, "--teacher_checkpoint: .* works at 16000 Hz, this run at 8000"),
    "split": ({"distillation_type": "logits", "class_parallel": True}, "logits compares all classes, but class_paral"),
    "drawn": ({"distillation_type": "both", "class_sample_rate": 0.5}, "both compares all classes, but class_sample_"),
    "frozen": ({"distillation_alpha": 1, "freeze_epochs": 1}, "--freeze_epochs: trains the loss's weights alone"),
    "other classes": ({"distillation_type": "logits", "speed_perturb": True}, "has 6 of them, this run 18: speed_pert"),
    "no logits": ({"distillation_type": "logits", "trainfunc": "sphereface2"}, "'sphereface2' .*gives no logits; dist"),
}


@pytest.mark.parametrize("keys, line", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_one_line(settings, teacher, capsys, keys, line):
    assert trainSpeakerNet.main(words({**settings, "teacher_checkpoint": teacher}, **keys)) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert re.search(line, told), told


def test_teachers_of_other_speakers_and_losses_give_no_classes(settings, tools, teacher, tmp_path):
    state = torch.load(teacher, weights_only=True)
    other = tmp_path / "other.model"
    torch.save({**state, "speakers": "0" * 64}, other)
    with pytest.raises(UsageError, match="trained with other speakers than those of"):
        tools.build(settings, teacher_checkpoint=other, distillation_type="logits")
    weights = {name: t for name, t in state["model_state_dict"].items() if not name.startswith("__L__.")}
    torch.save({**state, "model_state_dict": weights}, other)
    with pytest.raises(UsageError, match=r"the weights of its loss are not whole: __L__.weight: not in the file"):
        tools.build(settings, teacher_checkpoint=other, distillation_type="logits")


def test_a_teacher_with_nan_weights_is_refused_by_name(settings, teacher, capsys, tmp_path):
    state = torch.load(teacher, weights_only=True)
    name = next(n for n in state["model_state_dict"] if n.endswith("conv.weight"))
    state["model_state_dict"][name].view(-1)[3] = math.nan
    bad = tmp_path / "bad.model"
    torch.save(state, bad)
    assert trainSpeakerNet.main(words(settings, teacher_checkpoint=bad)) == 2
    assert f"teacher_checkpoint: {bad}: 1 tensors are not finite ({name})" in capsys.readouterr().err


def test_keys_without_a_teacher_are_noted(settings, capsys):
    assert trainSpeakerNet.main([*words(settings, distillation_alpha=0.3), "--print_config"]) == 0
    assert "--distillation_alpha is set, but there is no teacher (teacher_checkpoint)" in capsys.readouterr().err


def test_a_teacher_that_has_changed_is_told_on_resuming(settings, tools, teacher, capsys):
    keys = {**settings, "teacher_checkpoint": teacher, "max_epoch": 1}
    assert trainSpeakerNet.main(words(keys, device="cpu")) == 0
    state = torch.load(teacher, weights_only=True)
    torch.save({**state, "step": 7}, teacher)
    assert trainSpeakerNet.main(words({**keys, "max_epoch": 2}, device="cpu")) == 0
    out = capsys.readouterr().out
    assert f"  {teacher} changed since this state was saved: the student goes on with another" in out
    assert f"those of the state; what follows is not, for {teacher} changed" in out
    assert trainSpeakerNet.main(words({**settings, "max_epoch": 2}, device="cpu")) == 0
    assert f"teacher_checkpoint: {teacher} before, an empty value now" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["last.model", "last_previous.model", "model_best.safetensors", "model000000001.model"]
)
def test_a_teacher_that_the_run_itself_writes_is_refused(settings, teacher, capsys, tmp_path, name):
    run = tmp_path / "itself"
    (run / "model").mkdir(parents=True)
    shutil.copy(teacher, run / "model" / name)
    (tmp_path / "link").symlink_to(run)
    keys = {**settings, "save_path": run}
    assert trainSpeakerNet.main(words({**keys, "teacher_checkpoint": tmp_path / "link" / "model" / name})) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "is a checkpoint of this very run (save_path" in told, told
    shutil.copy(teacher, run / "model" / "teacher.model")
    more = words({**keys, "teacher_checkpoint": run / "model" / "teacher.model"})
    assert trainSpeakerNet.main([*more, "--print_config"]) == 0


def test_a_teacher_of_an_unknown_model_is_told_the_nearest_name(settings, teacher, capsys):
    assert trainSpeakerNet.main(words(settings, teacher_checkpoint=teacher, teacher_model="ECAPA")) == 2
    assert "no plug-in 'models/ECAPA.py' - did you mean 'ECAPA_TDNN'?" in capsys.readouterr().err
