"""mixup: what is computed, that it is drawn again, and that a dump of it is replayed."""

import pytest
import torch
from samples import VALUES

import trainSpeakerNet
from postmortem import load_dump
from SpeakerNet import SpeakerNet
from training.mixup import draw_mix


def network_of(**more):
    torch.manual_seed(0)
    keys = {"model": "ECAPA_TDNN", "channels": 8, "aggregate": 16, "trainfunc": "aamsoftmax", "nPerSpeaker": 1}
    return SpeakerNet({**VALUES, **keys, **more})


def test_waveforms_and_losses_are_mixed_in_training_alone():
    plain, mixed = network_of(), network_of(mixup=0.4)
    data, label = 0.1 * torch.randn(1, 5, 8000), torch.tensor([0, 3, 1, 1, 4])
    torch.manual_seed(7)
    share, order = draw_mix(0.4, 5)
    x = share * data + (1 - share) * data[:, order]
    with torch.no_grad():
        expected = float(share * plain(x, label)[0] + (1 - share) * plain(x, label[order])[0])
    torch.manual_seed(7)
    loss, accuracy = mixed(data, label)
    loss.backward()
    assert 0 < share < 1 and loss.item() == pytest.approx(expected, rel=1e-5) and 0 <= float(accuracy) <= 100
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixed.parameters())
    plain, mixed = network_of(), network_of(mixup=0.4)
    assert torch.equal(plain.eval()(data, label)[0], mixed.eval()(data, label)[0])
    assert torch.equal(plain.train()(data), mixed.train()(data))


def test_shares_are_those_of_a_beta_distribution():
    torch.manual_seed(0)
    shares = torch.tensor([draw_mix(0.5, 2)[0] for _ in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02) and shares.var() == pytest.approx(1 / 8, abs=0.01)


def test_a_dumped_step_is_mixed_again_bit_for_bit(settings, tools):
    status = trainSpeakerNet.main([f"--{k}={v}" for k, v in {**settings, "mixup": 0.5, "nan_inject": "3:grad"}.items()])
    (path,) = (tools.root / settings["save_path"] / "debug_nan").glob("nan_batch_*.pt")
    dump = load_dump(path)
    assert status == 0 and dump.content["config"]["mixup"] == 0.5
    assert dump.replay().loss == dump.content["loss"]
    assert dump.try_fix(settings={"mixup": 0.0}).loss != dump.content["loss"]


def test_rows_of_several_utterances_are_refused(settings, capsys):
    keys = {**settings, "trainfunc": "angleproto", "nPerSpeaker": 2, "mixup": 0.2}
    assert trainSpeakerNet.main([f"--{k}={v}" for k, v in keys.items()]) == 2
    assert capsys.readouterr().err == "command line: --mixup: mixes rows of one utterance, but nPerSpeaker is 2\n"


def test_the_classes_drawn_for_both_labels_of_a_row_move_and_no_others(settings, tools):
    trainer = tools.build(settings, mixup=0.5, class_sample_rate=0.2, optimizer="sgd", weight_decay=0.1)
    (batch, *_), head = tools.batches(trainer), trainer.network.loss
    before, trained = head.weight.detach().clone(), trainer.train_step([batch])
    moved = (head.weight != before).any(dim=1)
    assert (
        trained is not None
        and torch.equal(moved, head.notes.touched)
        and set(batch["label"].tolist()) <= set(moved.nonzero().flatten().tolist())
    )
