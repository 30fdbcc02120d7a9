"""Which layers int8 leaves as they are: by the graph, whatever a front end is called."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from samples import Network

import export
from config import Config
from errors import UsageError
from exporting import eight_bits, formats, forms
from speaker_model import SpeakerModel

# A file as a user writes it: its own spectrum, under a name of its own, rectified before the logarithm.
MINE = """
import torch
from torch import nn


class Cochlea(nn.Module):
    def __init__(self):
        super().__init__()
        time = torch.arange(400.0)
        tones = torch.arange(1, 41)[:, None] * 0.06 * time
        window = torch.hann_window(400)
        self.register_buffer("tones", torch.cat([tones.cos() * window, tones.sin() * window])[:, None])
        self.mix = nn.Linear(40, 24)

    def forward(self, x):
        real, imaginary = torch.conv1d(x[:, None], self.tones, stride=160).chunk(2, dim=1)
        power = (real**2 + imaginary**2).transpose(1, 2)
        return (torch.relu(self.mix(power)) + 1e-5).log()


class MainModel(nn.Module):
    def __init__(self, nOut=12):
        super().__init__()
        self.ear = Cochlea()
        self.body = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, nOut))

    def forward(self, x):
        y = self.ear(x)
        return self.body(y - y.mean(dim=1, keepdim=True)).square().mean(dim=1).sqrt()
"""


@pytest.fixture
def mine():
    """That model; it goes by the name of a plug-in on disk, whose keys its identity takes."""
    space: dict = {}
    exec(MINE, space)
    torch.manual_seed(0)
    model = space["MainModel"]()
    torch.nn.init.uniform_(model.ear.mix.weight, 0, 1)
    return SpeakerModel(Network(model), Config(model="XVector", nOut=12), torch.device("cpu"), "tiny.model")


def test_the_spectrum_of_a_front_end_of_ones_own_stays_in_fp32(mine, tmp_path):
    exact, coarse, blunt = (tmp_path / name for name in ("a.onnx", "b.onnx", "c.onnx"))
    formats.write(forms.exportable(mine, "waveform"), mine, "waveform", exact)
    assert eight_bits.quantise_onnx(exact, coarse) == (3, 5)  # the tones, the mix, the first layer behind them
    kinds = [node.op_type for node in onnx.load(coarse).graph.node]
    assert kinds.count("MatMulInteger") == 2 and "Conv" in kinds and "ConvInteger" not in kinds
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(exact, blunt, weight_type=QuantType.QUInt8, per_channel=True)
    # Speech with a quiet half, as rooms and pauses have it: 8 bits of its power hold the loud half only.
    given = forms.speech_like(16000, 2.0, 3)
    given[:, 16000:] *= 0.01
    cost = {
        path: export.differences(formats.reader(path)(given), formats.reader(exact)(given))[1]
        for path in (coarse, blunt)
    }
    assert cost[coarse] < 1e-3 and cost[blunt] > 10 * cost[coarse], cost


def graph(*nodes):
    """A graph of (operation, inputs, output) on the input x."""
    made = [helper.make_node(op, list(inputs), [output], name=output) for op, inputs, output in nodes]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", nodes[-1][2])]
    return helper.make_graph(made, "g", ends[:1], ends[1:])


@pytest.mark.parametrize(
    ("nodes", "spared"),
    [
        ([("Conv", "xw", "a"), ("Relu", "a", "b"), ("Conv", "bw", "c")], "ab"),
        ([("Conv", "xw", "a"), ("Relu", "a", "b"), ("Log", "b", "c"), ("MatMul", "cw", "d")], "abcd"),
        ([("Conv", "xw", "a"), ("Clip", ["a", "0", ""], "b"), ("Conv", "bw", "c")], "abc"),
        ([("Conv", "xw", "a"), ("Clip", ["a", "0", "6"], "b"), ("Conv", "bw", "c")], "ab"),
        ([("Conv", "xw", "a"), ("Erf", "a", "b"), ("Mul", "ab", "c"), ("Conv", "cw", "d")], "ab"),  # GELU
        ([("Conv", "xw", "a"), ("Relu", "a", "b"), ("Add", "ab", "c"), ("Conv", "cw", "d")], "ab"),  # a residual
        ([("Conv", "xw", "a"), ("Relu", "a", "b"), ("Conv", "bw", "c"), ("Log", "c", "d")], "ab"),  # one far behind
        ([("Shape", "x", "s"), ("Conv", "xw", "a"), ("Reshape", "as", "b"), ("Gemm", "bw", "c")], "abc"),
    ],
)
def test_what_lies_before_the_first_activation(nodes, spared):
    assert eight_bits.before_activations(graph(*nodes)) == list(spared)


def test_a_graph_without_an_activation_is_refused(tmp_path):
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.ones(16))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    whole = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "y")], "g", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(whole), tmp_path / "a.onnx")
    with pytest.raises(UsageError, match=r"--int8: all 1 layers .* before its first activation"):
        eight_bits.quantise_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
