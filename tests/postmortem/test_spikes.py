"""A step that was finite and far out is dumped on request, and its row, label, weight or learning rate is named."""

import json

import numpy as np
import pytest
import torch
from programs import analyser

from postmortem.analysis import analyse
from postmortem.spikes import LogitRecorder
from storage.dump import read_dump, read_state

STEPS = 90


def history(loss, norm, lr=0.003, count=150):
    rng = np.random.default_rng(0)
    wobble = [np.exp(rng.normal(0, 0.05, count)) for _ in range(2)]
    steps = [{"loss": loss * float(a), "grad_norm": norm * float(b)} for a, b in zip(*wobble)]
    return [{"step": i, "accuracy": 100.0, "lr": lr, "scale": 1.0, **step} for i, step in enumerate(steps)]


@pytest.fixture(scope="module")
def weights():
    """The weights of a network that knows the voices, made by the first test that asks for them."""
    return {}


@pytest.fixture
def run(settings, tools, weights):
    """A trainer of a network that knows the voices, with an ordinary history, and a batch of it."""

    usual_keys = {
        **{"nan_dump_spikes": True, "batch_size": 6, "max_frames": 80, "max_epoch": 60, "lr": 0.003},
        "trainfunc": "softmax",
    }

    def train():
        """By a trainer of its own, whose schedule moves on: no test depends on which of them was the first."""
        trainer, epoch = tools.build(settings, **usual_keys), 0
        while trainer.progress.step < STEPS:
            epoch += 1
            for batch in tools.batches(trainer, epoch):
                trainer.train_step([batch])
        weights.update({n: t.clone() for n, t in trainer.network.state_dict().items()})

    def make(**keys):
        if not weights:
            train()
        trainer = tools.build(settings, **{**usual_keys, **keys})
        trainer.network.load_state_dict(weights)
        batch = tools.batches(trainer)[0]
        usual = trainer.step
        usual.begin()
        attempt = usual.attempt([batch])
        usual.rewind()
        trainer.incidents.history.clear()
        trainer.incidents.history.extend(history(attempt.loss, attempt.norm))
        trainer.progress.batch = trainer.progress.epoch = 1
        return trainer, batch, attempt

    return make


def spiked(trainer, batch):
    """Take the step and return the dump that it leaves."""
    assert trainer.train_step([batch]) is not None
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("spike_*.pt")
    return path


def with_one_grown(network, name="__S__.pool.linear2.weight", factor=60.0):
    with torch.no_grad():
        network.state_dict()[name].mul_(factor)


def with_noise(network):
    """Every weight moved by some of its size, as steps with too high a rate do."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5 * parameter.abs().mean())


def verified(verdict):
    return [fix["change"] for fix in verdict["recommendations"] if fix["verdict"] == "verified"]


def far_out(verdict):
    assert verdict["reason"] == "spike" and verdict["replay"]["reproduced"] == "bit_equal", verdict
    assert verdict["evidence"][0].startswith("against the steps before it: loss "), verdict["evidence"]
    return verdict["cause"], verdict["detail"]


@pytest.mark.parametrize("seed", [2, 4])
def test_a_row_of_noise_is_an_outlier(run, seed):
    trainer, batch, _ = run()
    torch.manual_seed(seed)
    batch["data"][0, 2] = 0.3 * torch.randn(batch["data"].shape[2])
    path = spiked(trainer, batch)
    verdict = analyse(path).verdict
    assert far_out(verdict) == ("input", "outlier_row")
    assert verdict["location"]["rows"] == [2]
    assert [f["path"] for f in verdict["location"]["files"]] == [batch["files"][2]["path"]]
    assert verified(verdict) == [{"file": batch["files"][2]["path"]}]


def test_audio_that_stands_out_is_told_from_a_wrong_label(run):
    """A row that is far too loud and has another speaker's label, too: the audio goes first."""
    trainer, batch, _ = run()
    batch["data"][0, 2] *= 40.0
    batch["label"][2] = (batch["label"][2] + 3) % 6
    verdict = analyse(spiked(trainer, batch)).verdict
    assert far_out(verdict) == ("input", "outlier_row")
    assert any("row 2 is" in line and "louder than the others" in line for line in verdict["evidence"])


def test_a_wrong_label_is_told_from_a_bad_recording(run):
    trainer, batch, _ = run()
    right = int(batch["label"][2])
    wrong = batch["label"][2] = (right + 3) % 6
    path = spiked(trainer, batch)
    analysis = analyse(path)
    verdict = analysis.verdict
    assert far_out(verdict) == ("label", "unlikely") and verdict["location"]["rows"] == [2]
    assert any(line.startswith(f"with label {right} instead of {wrong}: loss 0.0") for line in verdict["evidence"])
    assert f"has label {wrong}, and with label {right} the step is ordinary" in analysis.summary
    assert verified(verdict) == [{"file": batch["files"][2]["path"]}]
    assert f"correct the speaker of {batch['files'][2]['path']}" in verdict["recommendations"][0]["text"]


def test_a_weight_that_has_grown_is_named(run):
    trainer, batch, _ = run()
    with_one_grown(trainer.network)
    verdict = analyse(spiked(trainer, batch)).verdict
    assert far_out(verdict) == ("state", "weight_growth")
    assert verdict["location"]["parameter"] == "__S__.pool.linear2.weight"
    (fix,) = verdict["recommendations"]
    assert (fix["action"], fix["verdict"]) == ("restore", "verified") and "scaled by 0.01" in fix["outcome"]


def test_a_rate_far_above_that_before_is_at_fault_if_no_row_is(run):
    trainer, batch, _ = run()
    with_noise(trainer.network)
    for step in list(trainer.incidents.history)[-12:]:
        step["lr"] = 0.6
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.6
    analysis = analyse(spiked(trainer, batch))
    verdict = analysis.verdict
    assert far_out(verdict) == ("optimizer", "lr") and verdict["location"]["rows"] == []
    assert "The learning rate rose from 0.003 to 0.6" in analysis.summary
    assert verdict["location"]["source"] == "scheduler/cosine.py"
    assert {"lr": 1.5e-05} in verified(verdict), verdict["recommendations"]


def test_a_loss_that_rises_over_many_steps_points_to_the_rate(run):
    trainer, batch, _ = run()
    with_noise(trainer.network)
    recent = list(trainer.incidents.history)[-40:]
    for index, step in enumerate(recent):
        step["loss"] *= 1.03**index
    analysis = analyse(spiked(trainer, batch))
    assert far_out(analysis.verdict) == ("optimizer", "lr")
    assert "the learning rate (0.003) is too high. No row is at fault." in analysis.summary
    assert "The loss has risen over" in analysis.summary


def test_what_no_test_explains_is_unknown(run):
    trainer, batch, _ = run()
    with_noise(trainer.network)
    analysis = analyse(spiked(trainer, batch))
    assert far_out(analysis.verdict) == ("unknown", "spike") and analysis.verdict["recommendations"] == []


def test_a_loss_without_logits_is_searched_by_halves(run, monkeypatch):
    monkeypatch.setattr(LogitRecorder, "read", lambda recorder: (None, None))
    trainer, batch, _ = run()
    right = int(batch["label"][2])
    batch["label"][2] = (right + 3) % 6
    verdict = analyse(spiked(trainer, batch)).verdict
    assert far_out(verdict) == ("label", "unlikely") and verdict["location"]["rows"] == [2]
    assert any(line.startswith(f"with label {right} instead of") for line in verdict["evidence"])


def test_without_room_for_the_weights_the_row_is_named_by_what_the_run_noted(run):
    trainer, batch, _ = run()
    batch["label"][2] = (batch["label"][2] + 3) % 6
    size = batch["data"].numel() * 4
    trainer.incidents.writer.max_bytes = 2 * size + 1000  # half of it is for spikes
    path = spiked(trainer, batch)
    assert read_dump(path)["state"] == "" and not list(path.parent.glob("state_*.pt"))
    analysis = analyse(path)
    verdict = analysis.verdict
    assert (verdict["cause"], verdict["detail"], verdict["location"]["rows"]) == ("input", "outlier_row", [2])
    assert "listen to it. It was not replayed." in analysis.summary
    assert verdict["recommendations"][0]["verdict"] == "untested"


def test_a_dump_holds_the_step_as_it_began_and_nothing_is_changed_by_it(run, tools):
    trainer, batch, _ = run()
    quiet, again, _ = run(nan_dump_spikes=False, save_path=str(trainer.config.save_path) + "2")
    for one in (batch, again):
        one["label"][2] = (one["label"][2] + 3) % 6
    before = {n: t.clone() for n, t in trainer.network.state_dict().items()}
    random = torch.get_rng_state()
    path = spiked(trainer, batch)
    torch.set_rng_state(random)
    quiet.train_step([again])
    tools.assert_same(tools.snapshot(trainer), tools.snapshot(quiet))
    assert not quiet.incidents.writer.folder.exists()
    dump = read_dump(path)
    state = read_state(path, dump["state"])
    assert all(torch.equal(before[n], t) for n, t in state["model_state_dict"].items()) and len(before) > 50
    assert state["optimizer_state_dict"]["state"] == {} and dump["grad_stats"] == {}
    assert torch.equal(dump["rng_state"]["torch"], random)
    assert dump["spike"]["rows"][0]["row"] == 2 and len(dump["spike"]["rows"]) == 6
    assert path.name == "spike_batch_1_epoch_1.pt" and path.stat().st_mode & 0o777 == 0o600


def test_three_spikes_of_a_run_are_dumped_and_they_take_no_place_of_a_fault(run, capsys):
    trainer, batch, _ = run(nan_max_dumps=1, nan_inject="9:loss")
    usual, right = list(trainer.incidents.history), int(batch["label"][2])
    kept = {n: t.clone() for n, t in trainer.network.state_dict().items()}
    for number in range(1, 5):
        trainer.progress.batch = number
        trainer.incidents.history.clear()
        trainer.incidents.history.extend(usual)
        trainer.network.load_state_dict(kept)
        batch["label"][2] = (right + 3) % 6
        trainer.train_step([batch])
    trainer.progress.batch = 9
    assert trainer.train_step([batch]) is None
    state = trainer.incidents.state_dict()
    assert (state["spikes"], state["written"]) == (3, 1)
    trainer.close()
    names = sorted(p.name for p in trainer.incidents.writer.folder.glob("*_batch_*.pt"))
    assert names == ["nan_batch_9_epoch_1.pt", *(f"spike_batch_{i}_epoch_1.pt" for i in (1, 2, 3))]
    assert "not dumped: 3 spikes are" in capsys.readouterr().out
    states = {read_dump(trainer.incidents.writer.folder / name)["state"] for name in names}
    assert len(states) == 4 and "" not in states
    other = trainer.incidents
    other.spikes = 0
    other.load_state_dict(state)
    assert other.spikes == 3


def test_the_command_finds_a_spike_in_a_folder_and_draws_it(run, tmp_path):
    trainer, batch, _ = run()
    batch["label"][2] = (batch["label"][2] + 3) % 6
    path = spiked(trainer, batch)
    page = tmp_path / "page.html"
    done = analyser(path.parent, "--json", "--html", page)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["file"], found["cause"]) == (str(path), "label")
    assert "is probably wrong" in page.read_text(encoding="utf-8")
    text = analyser(path, "--no-replay").stdout
    assert "Cause: input (outlier_row)" in text and "not replayed: --no-replay" in text
