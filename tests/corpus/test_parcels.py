"""Batches of loader processes: what arrives is what was sent, in memory of its own, whatever their size."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from corpus import parcels
from corpus.loader import Loader, LoaderFailed
from settings.reader import load_config


class Numbers(Dataset):
    """Rows of as many values as the item says."""

    def __len__(self):
        return 1 << 20

    def __getitem__(self, item):
        return np.full(1 + item % 7, item, np.float32)


def settings_of(ahead):
    return load_config([f"--prefetch_factor={ahead}", "--model=ECAPA_TDNN", "--trainfunc=softmax"])[0]


def together(rows):
    tensors = {"data": torch.from_numpy(np.concatenate(list(rows))), "none": torch.empty(0, 3)}
    return {**tensors, "odd": torch.tensor([True, False, True]), "turned": torch.arange(6).view(2, 3).t(), "text": "x"}


@pytest.mark.parametrize("keep", [False, True])
def test_batches_of_any_size_arrive_as_they_were_sent_and_stay(keep):
    plan = [list(range(begin, begin + 1 + begin % 40)) for begin in range(30)]
    config = settings_of(2)
    loader = Loader(Numbers(), plan, together, config, 2, keep=keep)
    next(iter(loader))  # an epoch that is left, as by a signal: what is on the way is lost
    for _ in range(2):
        received = list(itertools.islice(loader, len(plan) + 1))  # all are kept: none may change when the next comes
        for items, batch in zip(plan, received, strict=True):
            expected = together([Numbers()[item] for item in items])
            assert not isinstance(batch, LoaderFailed) and batch.keys() == expected.keys() and batch["text"] == "x"
            for name in expected.keys() - {"text"}:
                assert torch.equal(batch[name], expected[name]) and batch[name].dtype == expected[name].dtype


def test_memory_is_made_once_for_each_batch_on_the_way():
    config = settings_of(2)
    loader = Loader(Numbers(), [[6]] * 40, together, config, 2)
    for number, batch in enumerate(loader):
        assert not isinstance(batch, LoaderFailed)
        if number == 39:
            assert len(parcels._places[loader.token]) == min(2, loader.workers) * 2
    assert loader.token not in parcels._places
