"""What plug-ins return is taken where it can be, and else named with its file and what to change."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from errors import UsageError
from training.returned import called, checked_embeddings, checked_loss
from utils import accuracy

GOOD = torch.ones(4, 12, requires_grad=True)


def network(training=False):
    layer = torch.nn.Linear(1, 1)
    return SimpleNamespace(size=12, model="mine", training=training, __S__=layer)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (torch.ones(4, 40, 12), "it returns (4, 40, 12) - pool over time"),
        (torch.ones(4, 12, 1), "it returns (4, 12, 1) - end it with .flatten(1)"),
        ((GOOD, None), "it returns (4, 12), None - return the embeddings alone"),
        ({"embedding": GOOD}, "it returns a dict of embedding - return the embeddings alone"),
        (None, "it returns None - is there a 'return'?"),
        (GOOD.double(), "it returns (4, 12) float64 - end it with .float()"),
        (GOOD.to(torch.complex64), "it returns (4, 12) complex64"),
        (torch.ones(4, 64), "it returns (4, 64) - set nOut: 64"),
        (GOOD.detach().numpy(), "it returns a ndarray"),
    ],
)
def test_what_is_no_embedding_is_named_with_what_to_change(found, words):
    with pytest.raises(UsageError, match=r"^models/mine\.py: forward must return embeddings \(rows, nOut\)") as caught:
        checked_embeddings(found, torch.zeros(4, 9), network())
    assert words in str(caught.value)


def test_one_row_without_its_dimension_is_named():
    with pytest.raises(UsageError, match=r"it returns \(12,\) - squeeze\(\) takes the rows away too"):
        checked_embeddings(torch.ones(12), torch.zeros(1, 9), network())


def test_embeddings_without_a_gradient_are_refused_in_training_alone():
    cut = GOOD.detach()
    with pytest.raises(UsageError, match="its embeddings have no gradient"):
        checked_embeddings(cut, torch.zeros(4, 9), network(training=True))
    frozen = network(training=True)
    frozen.__S__.requires_grad_(False)
    assert checked_embeddings(cut, torch.zeros(4, 9), frozen) is cut
    assert checked_embeddings(cut, torch.zeros(4, 9), network()) is cut
    in_double = GOOD.double()
    assert checked_embeddings(in_double, torch.zeros(4, 9, dtype=torch.float64), network()) is in_double


@pytest.mark.parametrize(
    "given",
    [25.0, 25, np.float64(25), np.float32([25]), torch.tensor([25.0]), torch.tensor(25), [torch.tensor([25.0])]],
    ids=repr,
)
def test_an_accuracy_is_taken_in_every_form_that_plug_ins_have(given):
    loss, percent = checked_loss((GOOD.mean().reshape(1), given), "loss/mine.py")
    assert loss.shape == () and float(percent) == 25 and torch.as_tensor(percent).shape == ()
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert float(checked_loss((GOOD.mean(), accuracy(scores, torch.tensor([0, 1]))), "loss/mine.py")[1]) == 50


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (2.5, "it returns a float"),
        ((2.5, 0.0), "it returns a float, a float"),
        ((GOOD.mean(), None), "it returns (), None - the accuracy is one number"),
        ((GOOD.mean(), torch.ones(4)), "it returns (), (4,) - the accuracy is one number"),
        ({"loss": GOOD.mean()}, "it returns a dict of loss"),
        ((GOOD.mean().detach(), 0.0), "it returns a loss without a gradient"),
    ],
)
def test_what_is_no_loss_is_named(result, words):
    with pytest.raises(UsageError, match=r"^loss/mine\.py: forward must return \(loss, accuracy in %\)") as caught:
        checked_loss(result, "loss/mine.py")
    assert words in str(caught.value)


def test_a_forward_pass_that_takes_other_arguments_is_named():
    with pytest.raises(UsageError, match=r"^loss/mine\.py: TypeError: .*takes 1 positional argument but 2 were given"):
        called(lambda x: x, "loss/mine.py", 1, 2)
