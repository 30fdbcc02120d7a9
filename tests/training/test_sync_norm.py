"""BatchNorm over the rows of all processes is that of one process with all of the rows."""

import programs
import pytest
import torch
from torch import nn

from errors import UsageError
from training.sync_norm import OverAll, by_own_rows, synchronise

SCRIPT = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}, {root!r} + "/tests"]
import torch
import torch.distributed as dist
from training.sync_norm import by_own_rows, synchronise
from test_sync_norm import PARTS, built, passes
dist.init_process_group("gloo")
rank = dist.get_rank()
network = built()
synchronise(network, torch.device("cpu"))
torch.save(passes(network, PARTS[rank], alone=by_own_rows), os.path.join({folder!r}, f"{{rank}}.pt"))
"""
X = torch.randn(7, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 3 + 5
PARTS = [slice(0, 4), slice(4, 7)]


def built():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(36, affine=False, momentum=None)
    )


def passes(network, rows, alone=None):
    """Two steps on rows of X: outputs, gradients and buffers; then a third with the process's own rows."""
    found = {}
    for number in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            x = X[rows].clone().requires_grad_()
            network.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
                out = network(x * (1 + number))
            out.float().sin().sum().backward()
            key = f"{number} {dtype}"
            found |= {f"out {key}": out.detach(), f"x {key}": x.grad}
            found |= {f"{name} {key}": p.grad.clone() for name, p in network.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    if alone is not None:
        with alone(network):
            found["alone"] = network(X[rows]).detach()
    return found


def test_two_processes_with_unequal_rows_give_outputs_gradients_and_statistics_of_one(tmp_path):
    script = tmp_path / "norm.py"
    script.write_text(
        SCRIPT.format(root=str(programs.ROOT), tests=str(programs.ROOT / "tests" / "training"), folder=str(tmp_path))
    )
    done = programs.run_ranks(script)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    parts, whole = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)], passes(built(), slice(None))
    for name, wanted in whole.items():
        close = {"rtol": 0.05, "atol": 0.15} if "bfloat16" in name else {"rtol": 1e-4, "atol": 1e-4}
        if name.startswith(("out", "x ")):
            ours = torch.cat([part[name] for part in parts])
        elif "torch" in name:  # a gradient of a weight
            ours = parts[0][name] + parts[1][name]
        else:
            ours = parts[0][name]
            assert torch.equal(ours, parts[1][name]), name
        assert ours.dtype == wanted.dtype and torch.allclose(ours, wanted, **close), name
    for part, rows in zip(parts, PARTS):
        network = built()
        assert torch.allclose(part["alone"], network(X[rows]), atol=1e-5)


def test_names_and_numbers_stay_and_another_norm_is_refused():
    network, plain = built(), built()
    synchronise(network, torch.device("cpu"))
    assert isinstance(network[1], OverAll) and list(network.state_dict()) == list(plain.state_dict())
    with by_own_rows(network):
        assert network[1].alone and network[4].alone
    assert torch.equal(network(X), plain(X)) and not network[1].alone  # one process alone

    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return x

    with pytest.raises(UsageError, match=r"^sync_batchnorm: '1' is a Own, which normalises in its own way"):
        synchronise(nn.Sequential(nn.Linear(2, 2), Own(2)), torch.device("cpu"))
