"""Small pieces that plug-in files import."""

import re

import torch
import torch.nn.functional as F

__all__ = ["PreEmphasis", "accuracy", "cosine_matrix", "plain_names"]


def plain_names(text: str) -> str:
    """Names of parameters as people say them: '__S__.conv.weight' is 'model.conv.weight', '__L__' is 'loss'."""
    return re.sub(r"(?<![\w.])__([SL])__(?=\W|$)", lambda found: {"S": "model", "L": "loss"}[found[1]], text)


def accuracy(output, target, topk=(1,)):
    """Top-k accuracy in %: output (B, C) scores, target (B,) labels -> a list of 0-dim tensors, one for each k.

    Of fewer than k classes every one is among the best k.
    """
    order = output.topk(min(max(topk), output.shape[1]), dim=1).indices  # (B, max k)
    hits = order == target.view(-1, 1)
    return [hits[:, :k].any(dim=1).float().mean() * 100.0 for k in topk]


def cosine_matrix(x, y):
    """Cosine of each row of x (..., N, D) with each row of y (..., K, D) in fp32, inside [-1, 1]; zero rows give 0.

    Autocast is off: fp16 spacing just below 1 is 5e-4, which destroys angles. F.normalize divides by max(norm, eps), so
    the gradient at a zero row is up to 1 / eps: with 1e-6 it is large and, in fp32, far from an overflow.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=1e-6)
        y = F.normalize(y.float(), dim=-1, eps=1e-6)
        return (x @ y.transpose(-1, -2)).clamp(-1.0, 1.0)


def total_norm(tensors) -> torch.Tensor:
    """Euclidean norm over the elements of all tensors of a list: nn.utils.get_total_norm, which is torch 2.6's."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))) if tensors else torch.zeros(())


class PreEmphasis(torch.nn.Module):
    """First-order high-pass y[t] = x[t] - coef x[t-1], with x reflected at the start: (B, T) -> (B, T)."""

    def __init__(self, coef: float = 0.97):
        super().__init__()
        self.coef = coef
        self.register_buffer("flipped_filter", torch.tensor([-coef, 1.0]).view(1, 1, 2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padded = F.pad(input.unsqueeze(1), (1, 0), "reflect")
        return F.conv1d(padded, self.flipped_filter).squeeze(1)
