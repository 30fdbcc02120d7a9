"""Weights in 8 bits: of matrix products and convolutions of an ONNX graph, but for what the waveform meets first."""

import logging
from pathlib import Path

from errors import UsageError

WEIGHTED = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
RECURRENT = {"LSTM", "GRU", "RNN"}
ACTIVATIONS = set(
    "Relu LeakyRelu ThresholdedRelu PRelu Elu Selu Celu Gelu Erf Mish HardSwish Sigmoid HardSigmoid Tanh Softplus "
    "Softsign Softmax LogSoftmax".split()
)
SIZES = {"Shape", "Size"}  # what they give holds no value of a waveform


def quantise_onnx(source: Path, target: Path) -> tuple[int, int]:
    """Quantise weights to int8, those before the first activation left as they are: (left, all) layers of weights.

    A waveform and its power spectrum span 90 dB and more, which 256 steps cannot hold. Behind a logarithm, or the first
    activation function, values span no more than elsewhere in a network. UsageError if there is no activation.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source).graph
    spared = before_activations(graph)
    layers = [node.name for node in graph.node if node.op_type in WEIGHTED | RECURRENT]
    left = len(set(layers) & set(spared))
    if left == len(layers):
        raise UsageError(
            f"--int8: all {left} layers of the model lie before its first activation function: nothing to do"
        )
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # it recommends a pre-processing that changes nothing here
    try:
        quantize_dynamic(source, target, weight_type=QuantType.QUInt8, per_channel=True, nodes_to_exclude=spared)
    finally:
        log.setLevel(level)
    return left, len(layers)


def before_activations(graph) -> list[str]:
    """Names of the nodes that the input reaches on ways without an activation function only.

    An activation that a logarithm follows, before any other weight, is part of the spectrum: log(relu(x) + 1e-6).
    """
    names, early, derived = [], {value.name for value in graph.input}, {value.name for value in graph.input}
    inside = before_logarithms(graph)
    for node in graph.node:  # in the order of computation
        given = [name for name in node.input if name in derived]
        if not given or node.op_type in SIZES:
            continue
        derived.update(node.output)
        if early.issuperset(given):
            names.append(node.name)
            if not is_activation(node) or node.name in inside:
                early.update(node.output)
    return names


def is_activation(node) -> bool:
    """Whether a node is an activation function; one that clips from above is ReLU6 or its like."""
    clips = node.op_type == "Clip" and len(node.input) > 2 and bool(node.input[2])
    return clips or node.op_type in ACTIVATIONS | RECURRENT


def before_logarithms(graph) -> set[str]:
    """Names of the nodes from which a logarithm is reached without passing weights."""
    names, wanted = set(), set()
    for node in reversed(graph.node):
        leads = node.op_type == "Log" or wanted.intersection(node.output)
        if leads and node.op_type not in WEIGHTED | RECURRENT:
            names.add(node.name)
            wanted.update(node.input)
    return names
