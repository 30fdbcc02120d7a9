"""One of several processes that have each a slice of the classes: losses and gradients of CASES into a file.

python tests/loss/split_head.py OUT    with torchrun's variables
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from loss.classes import ClassHead
from settings import plugins
from training.ranks import Ranks

CLASSES, SIZE, ROWS = 50, 8, 6  # ROWS of each process
SUB = {"sub_centers": 3, "top_k": 5, "top_k_penalty": 0.06}
CASES = {
    "softmax": ("softmax", {}, 1.0),
    "amsoftmax": ("amsoftmax", {}, 1.0),
    "aamsoftmax": ("aamsoftmax", {}, 1.0),
    "easy margin": ("aamsoftmax", {"easy_margin": True}, 1.0),
    "sub-centres and top k": ("aamsoftmax", SUB, 1.0),
    "more top k than classes of a process": ("aamsoftmax", {**SUB, "top_k": 40}, 1.0),
    "sphereface2 C": ("sphereface2", {}, 1.0),
    "sphereface2 A": ("sphereface2", {"margin_type": "A"}, 1.0),
    "softmaxproto": ("softmaxproto", {}, 1.0),
    "a share of softmax": ("softmax", {}, 0.2),
    "a share of sub-centres and top k": ("aamsoftmax", SUB, 0.2),
    "a share of hardly any": ("amsoftmax", {}, 0.001),
    "a share of sphereface2": ("sphereface2", {}, 0.2),
}


def build(case: str):
    """The loss of a case, whole."""
    name, keys, rate = CASES[case]
    torch.manual_seed(0)
    values = {"nOut": SIZE, "nClasses": CLASSES, "margin": 0.2, "scale": 10.0, **keys}
    loss = plugins.call(plugins.load("loss", name), values)
    for head in heads_of(loss):
        head.sample(rate, 7)
    if hasattr(loss, "bias"):
        loss.bias.data.fill_(-1.5)
    return loss


def heads_of(loss) -> list:
    """The heads with class weights in a loss."""
    return [module for module in loss.modules() if isinstance(module, ClassHead)]


def sliced_of(module) -> tuple:
    """The names of a module's parameters that have a row for each class."""
    return module.class_weights if isinstance(module, ClassHead) else ()


def inputs(case: str, world: int):
    """Rows (world, ROWS, ..) of all processes, and labels (world, ROWS), some the same; process r leaves out r."""
    generator = torch.Generator().manual_seed(1)
    more = (2,) if CASES[case][0] == "softmaxproto" else ()
    x = torch.randn(world, ROWS, *more, SIZE, generator=generator)
    return x, torch.randint(CLASSES, (world, ROWS), generator=generator) // 3 * 3


def measure(loss, x, label, dtype) -> dict:
    """Loss, accuracy and gradients, with the rows coming from a layer under autocast."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        value, accuracy = loss(x @ torch.eye(SIZE), label)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), "accuracy": accuracy, "x": x.grad, **gradients}


def main(out: str):
    """Measure every case as this process of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for case in CASES:
        for dtype in ("float32", "bfloat16"):
            loss = build(case)
            for head in heads_of(loss):
                head.split(rank, world, 2 * ROWS)
            x, label = inputs(case, world)
            found[case, dtype] = measure(loss, x[rank, rank:], label[rank, rank:], dtype)
    torch.save(found, f"{out}.{rank}")
    Ranks.close(SimpleNamespace(world=world, host=None))  # which knows what torch 2.4 waits for


if __name__ == "__main__":
    main(sys.argv[1])
