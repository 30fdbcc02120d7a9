"""Find the first operation of a step that makes a non-finite value from finite ones, forward and backward."""

import math
import re
import sys
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from errors import first_line, refuses_numbers
from postmortem.built import BuiltNetwork
from postmortem.modes import is_whole
from postmortem.places import call_site
from settings.user_code import PLUG_INS
from training.distillation import modules_of, tensors_of

RECOMPUTED = "CheckpointFunctionBackward"
NONFINITE = re.compile(r"\b(nan|inf|infinity)", re.I)
UNCOMPUTED = ("empty", "new_empty", "resize", "set_", "_unsafe_view", "detach")  # these return no computed value
LEAST_GAIN = 1e6  # of a backward operation that is blamed for an overflow of the gradient norm
FRONT_END = ("frontend", "spectrogram", "melspec", "torchfb", "fbank", "mfcc", "preemphasis", "mel_scale")


@dataclass
class Site:
    """Where in the code an operation is: module path, its class, source line."""

    module: str = ""
    source: str = ""
    learned: bool = False  # a parameter was used at or before this point
    spectral: bool = False  # a Fourier transform was taken at or before this point


@dataclass(frozen=True)
class Range:
    """Extremes of the finite values of a tensor; NaN if it has none. Of complex numbers the magnitudes."""

    smallest: float
    largest: float
    nearest_to_zero: float
    zeros: int
    count: int = 1  # of all values, finite or not
    infinite: int = 0
    dtype: str = ""  # of the tensor; "" of whole numbers

    @property
    def farthest(self) -> float:
        """The extreme that is farther from zero."""
        return max(self.smallest, self.largest, key=abs)

    @classmethod
    def of(cls, tensor) -> "Range":
        tensor = tensor.detach()
        dtype = str(tensor.dtype).removeprefix("torch.") if tensor.is_floating_point() else ""
        values = (tensor.abs() if tensor.is_complex() else tensor).float().flatten()
        count, infinite = values.numel(), int(values.isinf().sum())
        values = values[values.isfinite()]
        if not values.numel():
            return cls(math.nan, math.nan, math.nan, 0, count, infinite, dtype)
        nearest = float(values[values.abs().argmin()])
        zeros = int((values == 0).sum())
        return cls(float(values.min()), float(values.max()), nearest, zeros, count, infinite, dtype)

    def __str__(self):
        if not self.count:
            return "nothing"
        if math.isnan(self.smallest):
            return "no finite value"
        zeros = f" ({self.zeros} zero{'s' if self.zeros > 1 else ''})" if self.zeros else ""
        zeros += f" ({self.infinite} infinite)" if self.infinite else ""
        return f"{self.smallest:.4g} to {self.largest:.4g}{zeros}"


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
    nonfinite_inputs: list = field(default_factory=list)  # names of data, weights and buffers that are non-finite
    finite_inputs: list = field(default_factory=list)  # names of finite weights and buffers among its inputs
    constant: bool = False  # a number in the code was not finite
    operands: list = field(default_factory=list)  # a Range for each tensor that it read
    numbers: list = field(default_factory=list)  # plain ones among its arguments
    refusal: str = ""  # what it said when it refused its numbers
    count: int = 0  # of all values of its result
    made: str = ""  # the buffer that has held its result since the network was built
    wraps: bool = False  # it left the range of its type, of whole numbers
    is_mask: bool = False  # its infinities are those that the code writes, as a mask does, or copies and sums of them

    @property
    def reduces_masks(self) -> bool:
        """Whether a row of which only a mask's infinities are left has become one value, as the largest of none."""
        return self.is_mask and not self.backward and 0 < self.count < max((r.count for r in self.operands), default=0)

    def described(self, operand: Range, text: str = "") -> str:
        """What it read, as ``text`` or as a range, with its type if that is not the type of the result."""
        other = operand.dtype and operand.dtype != self.dtype
        return f"{text or operand}{f' in {operand.dtype}' if other else ''}"

    @property
    def op_name(self) -> str:
        """The name of the operation in code: 'sqrt' for SqrtBackward0, 'softmax' for _softmax."""
        name = re.sub(r"Backward\d*$", "", self.node) or self.op
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")


class Probe(TorchDispatchMode):
    """Watches every operation of a step below autograd. Use as a mode of ``Replay.run``; then ask ``origin``.

    An operation is an origin if its output is not finite although all its inputs are, or if no operation made its
    non-finite input: data, a weight, a buffer, a number in the code.
    """

    def __init__(self, network, data, find_largest_gain: bool = False):
        super().__init__()
        self.find_largest_gain = find_largest_gain
        self.largest_gain_record = None
        self.largest_gain = LEAST_GAIN
        self.names = {id(m): name for name, m in modules_of(network)}
        self.names_by_pointer = {data.untyped_storage().data_ptr(): "data"}
        parameters, buffers = tensors_of(network)
        self.names_by_pointer |= {_pointer(t): name for name, t in [*parameters, *buffers]}
        self.parameters = {_pointer(p) for _, p in parameters}
        self.statistics = {b.untyped_storage().data_ptr() for b in network.buffers() if b.is_floating_point()}
        self.records = []
        self.producers = {}  # storage -> the record that made it non-finite
        self.sites, self.sequence = {}, -1
        self.stack, self.learned, self.spectral = [], False, False
        self.activations, self.hooks = [], []
        self.read = []  # records whose non-finite result the code read as a number
        self.whole_numbers = False  # whether there are any that may wrap around
        self.raised_in: str | None = None  # the innermost module that an exception came through

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
            left = self.stack.pop()
            if self.raised_in is None and sys.exc_info()[0] is not None:
                self.raised_in = left
        name = self.names.get(id(module), "")
        if name and isinstance(output, torch.Tensor) and output.is_floating_point() and not any(module.children()):
            values, bad = output.detach(), 0
            if not all_finite(values):
                finite = values.isfinite()
                bad, values = int(values.numel() - finite.sum()), values[finite]
            entry = {"name": name, "kind": type(module).__name__, "nonfinite": bad, "first": False}
            entry["abs_max"] = max(abs(float(end)) for end in values.aminmax()) if values.numel() else math.nan
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
        try:
            out = function(*args, **kwargs)
        except Exception as error:
            if refuses_numbers(error):
                self.record_refusal(name, inputs, (args, kwargs), error)
            raise
        if name == "_local_scalar_dense":  # .item(): the number may come back as a constant in a later operation
            self.read += [self.producers[_pointer(t)] for t in inputs if _pointer(t) in self.producers]
        node = torch._C._current_autograd_node()
        if node is not None and torch.is_grad_enabled() and node.name() == RECOMPUTED:
            node = None  # a checkpointed part of the forward pass is computed again
        if node is None:
            self.learned |= any(_pointer(t) in self.parameters for t in inputs)
            self.spectral |= "fft" in name
            now = torch.autograd._get_sequence_nr()
            if now != self.sequence:
                self.sequence = now
                self.sites[now - 1] = self.current_site()
        self.whole_numbers |= is_whole(name, out)
        if name.startswith(UNCOMPUTED):
            return out
        written = [t for t in _tensors([out]) if _numeric(t)]
        written += statistics if node is None else []
        bad = [t for t in written if not all_finite(t)]
        if self.find_largest_gain and node is not None and written and not bad:
            self.measure_gain(name, node, written, inputs, (args, kwargs))
        if bad:
            self.record(name, node, bad, inputs if copies is None else copies, inputs, (args, kwargs))
        bad_pointers = {_pointer(t) for t in bad}
        for t in written:
            if _pointer(t) not in bad_pointers and t.numel() * t.element_size() == t.untyped_storage().nbytes():
                self.producers.pop(_pointer(t), None)  # a part that is written does not clear the rest
        return out

    def record_refusal(self, name, inputs, arguments, error):
        """Note an operation that refuses its numbers; what was not finite before it is taken for its reason."""
        if name == "_linalg_check_errors":  # which has the name of the function that called it
            name = str(arguments[0][1]).replace(".", "_")
        before = [record for record in self.records if not record.is_mask][-1:]
        nothing = torch.full((1,), math.nan)
        record = self.record(name, torch._C._current_autograd_node(), [nothing], inputs, inputs, arguments)
        record.refusal = first_line(error)
        record.parents = record.parents or before

    def refused_by_python(self, refused: str) -> Record | None:
        """A record without an operation of an exception that no operation of torch raised: ``refused``, with its place.

        As of Python's division by zero, or a number that math.log does not take. None if its place is not known, or if
        the number was NaN or Inf before.
        """
        place = re.match(r"([^:]+\.py:\d+): (.*)", refused)
        if place is None or not place[1].startswith(PLUG_INS):
            return None
        if self.read or any(record.refusal for record in self.records) or NONFINITE.search(place[2]):
            return None
        module = self.raised_in or {"loss": "__L__"}.get(place[1].partition("/")[0], "__S__")
        site = Site(module, place[1], self.learned, self.spectral)
        return Record("", "", site, False, True, False, [], 0, "", refusal=place[2])

    def maker_of(self, name: str, tensor) -> Record | None:
        """The operation that made a buffer infinite, if a network was built under this probe; None of a mask."""
        record = self.producers.get(_pointer(tensor))
        while record is not None and record.parents:
            record = record.parents[0]
        if record is None or record.constant or record.nonfinite_inputs or not record.site.source:
            return None
        record.made, record.site = name, Site(name.rpartition(".")[0], record.site.source, learned=True)
        return record

    def measure_gain(self, name, node, written, inputs, arguments):
        """Keep the backward operation that multiplies the gradient most, if its result is still finite."""
        size = max(float(t.abs().max()) for t in written if t.numel()) if any(t.numel() for t in written) else 0.0
        before = max([float(t.abs().max()) for t in inputs if t.numel()], default=0.0)
        if size / max(before, 1e-3) > self.largest_gain:
            self.largest_gain = size / max(before, 1e-3)
            self.largest_gain_record = self.record(name, node, written, inputs, inputs, arguments)
            self.records.pop()
            for tensor in written:
                self.producers.pop(_pointer(tensor), None)

    def current_site(self) -> Site:
        """Return the site of the running operation of the forward pass."""
        return Site(self.stack[-1] if self.stack else "", call_site(3), self.learned, self.spectral)

    def record(self, name, node, bad, inputs, originals, arguments):
        """Note an operation with a non-finite output; ``inputs`` as they were before it, ``originals`` for identity."""
        if node is None:
            site = self.current_site()
        else:
            site = self.sites.get(node._sequence_nr(), Site())
            own = call_site(2)  # of a hand-written backward function
            if own:
                site = Site(site.module, own, site.learned, site.spectral)
        first = bad[0]
        rows, nan, infinite = bad_rows(first)
        record = Record(
            name,
            node.name() if node else "",
            site,
            node is not None,
            nan,
            infinite,
            rows,
            0,
            "",
        )
        record.size, record.dtype = (first.shape[0] if first.ndim else 0), str(first.dtype).removeprefix("torch.")
        record.count = first.numel()
        record.numbers = [v for v in _leaves(arguments) if type(v) in (int, float)]
        record.constant = not all(map(math.isfinite, record.numbers))
        if record.constant:
            record.parents += self.read[-1:]
        for tensor, original in zip(inputs, originals):
            if not all_finite(tensor):
                pointer = _pointer(original)
                if pointer in self.producers:
                    record.parents.append(self.producers[pointer])
                elif pointer in self.names_by_pointer:
                    record.nonfinite_inputs.append(self.names_by_pointer[pointer])
                else:
                    record.constant = True
            elif _pointer(original) in self.names_by_pointer:
                record.finite_inputs.append(self.names_by_pointer[_pointer(original)])
        from_masks = record.constant or bool(record.parents)
        from_masks &= all(parent.is_mask for parent in record.parents)
        record.is_mask = from_masks and not record.nan and not record.nonfinite_inputs
        if all(parent.is_mask for parent in record.parents):
            record.operands = [Range.of(t) for t in inputs[:3]]
        self.records.append(record)
        for tensor in bad:
            self.producers[_pointer(tensor)] = record
        return record

    def origin(self) -> Record | None:
        """Return the earliest origin of what is not finite at the end of the pass that failed first.

        A mask's infinity counts only through the first operation that makes NaN of it, or, if the loss is infinite,
        that is left with nothing else. In the backward pass the records of the forward pass do not count: it ended
        finite.
        """
        forward = [r for r in self.records if not r.backward]
        backward = [r for r in self.records if r.backward]
        ended = self.ancestors_of_last(forward)
        for records in (ended, self.ancestors_of_last(backward), self.records):
            for record in records:
                parents = [p for p in record.parents if p.backward or not record.backward]
                masked = any(p.is_mask for p in parents)
                if not record.is_mask and all(p.is_mask for p in parents) and (record.nan or not masked):
                    return record
            left_with_nothing = next((r for r in ended if r.reduces_masks), None)
            if left_with_nothing is not None:
                return left_with_nothing
        return None

    def first(self) -> Record | None:
        """Return the first operation with a non-finite result of finite inputs, for an optimizer's update."""
        return next((r for r in self.records if not r.parents and not r.is_mask), None)

    def ancestors_of_last(self, records: list) -> list:
        """Return the records that the last one stems from; none if the pass ended finite."""
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

    def end_forward(self, network, loss_finite: bool):
        """Note whether the forward pass ended with a non-finite loss or buffer."""
        bad_statistics = any(not bool(b.isfinite().all()) for b in network.buffers() if b.is_floating_point())
        self.forward_failed = not loss_finite or bad_statistics


def is_front_end(record: Record, network: nn.Module) -> bool:
    """Whether an operation belongs to the features: in a module of that name, or before anything learned.

    What a model's own ``forward`` does to the waveform is counted among the features; a layer in front of the first
    learned one only if a Fourier transform came before it.
    """
    if isinstance(network, BuiltNetwork):  # what it gets is no waveform
        return False
    path, site = record.site.module.lower(), record.site
    modules = dict(modules_of(network))
    kind = type(modules[site.module]).__module__ if site.module in modules else ""
    if kind.startswith("torchaudio") or site.source.startswith(("models/frontend.py", "frontend/")):
        return True
    if any(word in text for word in FRONT_END for text in (path, path.replace("_", ""))):
        return True
    early = not record.backward and not site.learned and not site.module.startswith("__L__")
    return early and (site.module in ("", "__S__") or site.spectral)


def all_finite(tensor) -> bool:
    """Whether all values are finite: the extremes are, and a NaN would be both. Ten times as fast as ``isfinite``."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def bad_rows(tensor) -> tuple[list[int], bool, bool]:
    """Indices of rows with a value that is not finite, [] of a number; whether one is NaN; whether one is infinite."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if not values.numel():
        return [], False, False
    rows = values.detach().reshape(len(values) if tensor.ndim else 1, -1)
    low, high = rows.aminmax(dim=1)
    bad = ~(low.isfinite() & high.isfinite())
    nan = bool(low.isnan().any())
    infinite = bool(rows[bad].isinf().any()) if nan else bool(bad.any())
    return bad.nonzero().flatten().tolist() if tensor.ndim else [], nan, infinite


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
    return [_values_of(leaf) for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]


def _values_of(tensor):
    """The values that a sparse tensor holds; another tensor as it is."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


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
