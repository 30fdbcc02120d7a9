"""A step that is finite and far out is seen and trained on."""

import json

import numpy as np
import pytest
import torch

from training.spikes import LEAST, row_losses, spike_in


def history(count=150, loss=4.0, norm=2.0, spread=0.05):
    rng = np.random.default_rng(0)
    return [
        {"loss": loss * float(np.exp(rng.normal(0, spread))), "grad_norm": norm * float(np.exp(rng.normal(0, spread)))}
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("loss", "norm", "named"),
    [
        (4.1, 2.1, []),
        (40.0, 2.1, ["loss_median"]),
        (4.1, 90.0, ["grad_norm_median"]),
        (40.0, 90.0, ["loss_median", "grad_norm_median"]),
        (0.01, 0.01, []),  # far below is no spike
        (7.0, 3.5, []),  # less than twice the median
    ],
)
def test_what_stands_out_is_named_with_its_median(loss, norm, named):
    found = spike_in(history(), loss, norm)
    assert [name for name in found if name.endswith("median")] == named
    if "loss_median" in found:
        assert found["loss_median"] == pytest.approx(4.0, rel=0.05)


def test_a_run_that_has_just_begun_and_losses_that_are_not_positive_have_no_spikes():
    assert spike_in(history(LEAST - 1), 400.0, 200.0) == {}
    assert spike_in(history(loss=-4.0), 400.0, 2.0) == {}


def test_a_spike_is_an_event_with_its_rows_and_leaves_no_trace(settings, tools, capsys):
    trainer, quiet = (tools.build(settings, save_path=f"{settings['save_path']}{i}") for i in range(2))
    (batch,) = tools.batches(trainer)[:1]
    trainer.incidents.history.extend({"step": 0, **step} for step in history(loss=0.5))
    for run in (trainer, quiet):
        torch.manual_seed(5)
        run.progress.batch = 1
        run.train_step([batch])
    tools.assert_same(tools.snapshot(trainer), tools.snapshot(quiet))
    event = json.loads(trainer.files.metrics.read_text().splitlines()[-1])
    assert event["event"] == "spike" and event["loss_median"] == pytest.approx(0.5, rel=0.05) and event["batch"] == 1
    losses = [row["loss"] for row in row_losses(trainer.step, [batch])]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert {row["path"] for row in event["rows"]} <= {info["path"] for info in batch["files"]}
    out = capsys.readouterr().out
    assert "spike at step 1: loss " in out and "most of it from " in out and not quiet.files.metrics.exists()


def test_a_loss_over_pairs_names_no_rows(settings, tools):
    trainer = tools.build(settings, trainfunc="angleproto", nPerSpeaker=2)
    assert row_losses(trainer.step, tools.batches(trainer)[:1]) == []
