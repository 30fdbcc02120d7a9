"""Find the first operation of a step that makes a non-finite value from finite ones, forward and backward."""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from postmortem.patches import call_site

UNWRITTEN = ("empty", "new_empty", "resize", "set_", "_unsafe_view", "detach")  # what these return is no computed value
FRONT_END = ("frontend", "spectrogram", "melspec", "torchfb", "fbank", "mfcc", "preemphasis", "mel_scale")


@dataclass
class Site:
    """Where in the code an operation is: module path, its class, source line."""

    module: str = ""
    source: str = ""
    learned: bool = False  # a parameter was used at or before this point
    spectral: bool = False  # a Fourier transform was taken at or before this point


@dataclass
class Record:
    """An operation that returned something non-finite."""

    op: str
    node: str  # the autograd node, in the backward pass
    site: Site
    backward: bool
    nan: bool
    infinite: bool
    rows: list  # rows of the first dimension that hold it
    size: int  # of the first dimension
    dtype: str
    parents: list = field(default_factory=list)  # records that made its non-finite inputs
    nonfinite_inputs: list = field(default_factory=list)  # names of data, weights and buffers among them
    known: list = field(default_factory=list)  # names of finite weights and buffers among its inputs
    constant: bool = False  # a number in the code was not finite
    operands: str = ""

    @property
    def op_name(self) -> str:
        """The operation as people call it: 'sqrt' for SqrtBackward0 and for _softmax 'softmax'."""
        name = re.sub(r"Backward\d*$", "", self.node) or self.op
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")

    @property
    def masks(self) -> bool:
        """An infinity that code puts in place on purpose, as a mask does."""
        return self.constant and not self.nan and not self.parents and not self.nonfinite_inputs


class Probe(TorchDispatchMode):
    """Watches every operation of a step below autograd. Use as a mode of ``Replay.run``; then ask ``origin``.

    An operation is an origin where its output is not finite although all its inputs are, or where a non-finite input
    is one that no operation made: data, a weight, a buffer, a number in the code.
    """

    def __init__(self, network, data, steep: bool = False):
        super().__init__()
        self.steep, self.steepest, self.ratio = steep, None, 1e6
        self.names = {id(m): name for name, m in network.named_modules()}
        self.known = {data.untyped_storage().data_ptr(): "data"}
        tensors = [*network.named_parameters(), *network.named_buffers()]
        self.known |= {t.untyped_storage().data_ptr(): name for name, t in tensors}
        self.parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.statistics = {b.untyped_storage().data_ptr() for b in network.buffers() if b.is_floating_point()}
        self.records, self.made = [], {}
        self.sites, self.sequence = {}, -1
        self.stack, self.learned, self.spectral = [], False, False
        self.activations, self.hooks = [], []

    def __enter__(self):
        self.hooks = [
            torch_module.register_module_forward_pre_hook(self.enter_module),
            torch_module.register_module_forward_hook(self.leave_module, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def enter_module(self, module, inputs):
        outer = self.stack[-1] if self.stack else ""  # of a module made on the fly
        self.stack.append(self.names.get(id(module), outer))

    def leave_module(self, module, inputs, output):
        if self.stack:
            self.stack.pop()
        name = self.names.get(id(module), "")
        if name and isinstance(output, torch.Tensor) and output.is_floating_point() and not any(module.children()):
            finite = output.isfinite()
            bad = int(output.numel() - finite.sum())
            values = output[finite] if bad else output
            entry = {"name": name, "kind": type(module).__name__, "nonfinite": bad, "first": False}
            entry["abs_max"] = float(values.detach().abs().max()) if values.numel() else math.nan
            entry["first"] = bool(bad) and not any(a["nonfinite"] for a in self.activations)
            self.activations.append(entry)

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        inputs = [t for t in _tensors([args, kwargs]) if _numeric(t)]
        statistics = []
        if "batch_norm" in name:  # written by it in training, not read
            statistics = [t for t in inputs if _pointer(t) in self.statistics]
            inputs = [t for t in inputs if _pointer(t) not in self.statistics]
        targets = _written_arguments(function, args, kwargs)
        copies = [t.clone() if any(t is w for w in targets) else t for t in inputs] if targets else None
        out = function(*args, **kwargs)
        node = torch._C._current_autograd_node()
        if node is None:
            self.learned |= any(_pointer(t) in self.parameters for t in inputs)
            self.spectral |= "fft" in name
            now = torch.autograd._get_sequence_nr()
            if now != self.sequence:
                self.sequence = now
                self.sites[now - 1] = self.here()
        if name.startswith(UNWRITTEN):
            return out
        written = [t for t in _tensors([out]) if _numeric(t)]
        written += statistics if node is None else []
        bad = [t for t in written if t.numel() and not bool(t.isfinite().all())]
        if self.steep and node is not None and written and not bad:
            self.measure(name, node, written, inputs, (args, kwargs))
        if bad:
            self.record(name, node, bad, inputs if copies is None else copies, inputs, (args, kwargs))
        bad_pointers = {_pointer(t) for t in bad}
        for t in written:
            if _pointer(t) not in bad_pointers and t.numel() * t.element_size() == t.untyped_storage().nbytes():
                self.made.pop(_pointer(t), None)  # a part that is written does not clear the rest
        return out

    def measure(self, name, node, written, inputs, arguments):
        """Keep the backward operation that multiplies the gradient most: where it is steep though finite."""
        size = max(float(t.abs().max()) for t in written if t.numel()) if any(t.numel() for t in written) else 0.0
        given = max([float(t.abs().max()) for t in inputs if t.numel()], default=0.0)
        if size / max(given, 1e-3) > self.ratio:
            self.ratio = size / max(given, 1e-3)
            self.steepest = self.record(name, node, written, inputs, inputs, arguments)
            self.records.pop()
            for tensor in written:
                self.made.pop(_pointer(tensor), None)

    def here(self) -> Site:
        """The site of the operation that is running in the forward pass."""
        return Site(self.stack[-1] if self.stack else "", call_site(3), self.learned, self.spectral)

    def record(self, name, node, bad, inputs, originals, arguments):
        """Note an operation with a non-finite output; ``inputs`` as they were before it, ``originals`` for identity."""
        if node is None:
            site = self.here()
        else:
            site = self.sites.get(node._sequence_nr(), Site())
            own = call_site(2)  # of a hand-written backward function
            if own:
                site = Site(site.module, own, site.learned, site.spectral)
        first = bad[0]
        wrong = ~first.isfinite()
        rows = wrong.flatten(1).any(dim=1) if first.ndim > 1 else wrong
        rows = rows.nonzero().flatten().tolist() if first.ndim else []
        record = Record(
            name,
            node.name() if node else "",
            site,
            node is not None,
            bool(first.isnan().any()),
            bool(first.isinf().any()),
            rows,
            0,
            "",
        )
        record.size, record.dtype = (first.shape[0] if first.ndim else 0), str(first.dtype).removeprefix("torch.")
        record.constant = any(isinstance(v, float) and not math.isfinite(v) for v in _leaves(arguments))
        for tensor, original in zip(inputs, originals):
            if tensor.numel() and not bool(tensor.isfinite().all()):
                pointer = _pointer(original)
                if pointer in self.made:
                    record.parents.append(self.made[pointer])
                elif pointer in self.known:
                    record.nonfinite_inputs.append(self.known[pointer])
                else:
                    record.constant = True
            elif _pointer(original) in self.known:
                record.known.append(self.known[_pointer(original)])
        if not record.parents:
            record.operands = ", ".join(_range(t) for t in inputs[:3])
        self.records.append(record)
        for tensor in bad:
            self.made[_pointer(tensor)] = record
        return record

    def origin(self) -> Record | None:
        """The earliest origin of what is not finite at the end of the pass that failed first.

        An infinity put in place on purpose (a mask) counts only through the first operation that makes a NaN of it. In
        the backward pass, what the forward pass made does not count: it ended finite all the same.
        """
        forward = [r for r in self.records if not r.backward]
        backward = [r for r in self.records if r.backward]
        for records in (self.reaching(forward), self.reaching(backward), self.records):
            for record in records:
                parents = [p for p in record.parents if p.backward or not record.backward]
                masked = any(p.masks for p in parents)
                if not record.masks and all(p.masks for p in parents) and (record.nan or not masked):
                    return record
        return None

    def first(self) -> Record | None:
        """The first operation that made something non-finite of what was finite, for code that is no network's step."""
        return next((r for r in self.records if not r.parents and not r.masks), None)

    def reaching(self, records: list) -> list:
        """Those of the records that the last of them stems from; none where the pass ended finite."""
        if not records or not self.failed(records):
            return []
        wanted, queue = set(), [records[-1]]
        while queue:
            record = queue.pop()
            if id(record) not in wanted:
                wanted.add(id(record))
                queue.extend(record.parents)
        return [r for r in records if id(r) in wanted]

    def failed(self, records: list) -> bool:
        """Whether a pass ended with a non-finite value: a loss or a statistic, a gradient."""
        if records[-1].backward:
            return True
        return self.forward_failed

    forward_failed = False

    def ended(self, network, loss_finite: bool):
        """Tell the probe how the forward pass ended."""
        bad_statistics = any(not bool(b.isfinite().all()) for b in network.buffers() if b.is_floating_point())
        self.forward_failed = not loss_finite or bad_statistics


def is_front_end(record: Record, network: nn.Module) -> bool:
    """Whether an operation belongs to the features: in a module of that name, or before anything learned.

    What a model's own ``forward`` does to the waveform is counted among the features; a layer in front of the first
    learned one only where a Fourier transform came before it.
    """
    path, site = record.site.module.lower(), record.site
    modules = dict(network.named_modules())
    kind = type(modules[site.module]).__module__ if site.module in modules else ""
    if kind.startswith("torchaudio") or site.source.startswith("models/frontend.py"):
        return True
    if any(word in text for word in FRONT_END for text in (path, path.replace("_", ""))):
        return True
    early = not record.backward and not site.learned and not site.module.startswith("__L__")
    return early and (site.module in ("", "__S__") or site.spectral)


def _pointer(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _leaves(value):
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _tensors(value):
    return [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]


def _numeric(tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _written_arguments(function, args, kwargs) -> list:
    """The tensors that an in-place or ``out=`` operation writes to, by its schema."""
    written = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += _tensors([value])
    return written


def _range(tensor) -> str:
    tensor = tensor.detach()
    values = (tensor.abs() if tensor.is_complex() else tensor).float().flatten()
    values = values[values.isfinite()]
    if not values.numel():
        return "nothing finite"
    zeros = int((values == 0).sum())
    text = f"{float(values.min()):.4g} to {float(values.max()):.4g}"
    return text + (f" with {zeros} zeros" if zeros else "")
