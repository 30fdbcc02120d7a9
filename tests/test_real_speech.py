"""A short run on real speech, where the set lies beside the checkout."""

import pytest


@pytest.fixture
def speech(tools):
    folder = tools.root.parent / "shared" / "speech"
    if not (folder / "train_list.txt").is_file():
        pytest.skip("no real speech beside the checkout")
    return folder


def test_real_speech_trains_with_augmentation(speech, settings, tools):
    trainer = tools.build(
        settings,
        train_list=speech / "train_list.txt",
        train_path=speech / "wav",
        test_list=speech / "trials.txt",
        test_path=speech / "wav",
        musan_path=speech / "noise" / "musan_split",
        rir_path=speech / "rir",
        augment=True,
        max_test_pairs=60,
        batch_size=16,
    )
    first = None
    for index, batch in enumerate(trainer.loader):
        attempt = trainer.train_step([batch])
        first = attempt.loss if first is None else first
        if index == 24:
            break
    assert trainer.progress.totals["skipped"] == 0 and not trainer.file_events.bad
    assert attempt.loss < first
    result = trainer.evaluator.run(trainer.network, 1)
    assert result["nan_scores"] == 0 and result["trials"] == 60 and result["eer"] < 50
