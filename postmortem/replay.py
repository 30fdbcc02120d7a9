"""Run the step of a dump again, unchanged or with one change."""

import contextlib
import copy
import math
import os
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from config import Config
from errors import first_line
from postmortem.modes import Casts, CudaCasts
from settings import plugins
from settings.user_code import changed_since
from SpeakerNet import SpeakerNet
from storage.dump import tensor_stats
from storage.dump_statistics import bad_state, number
from training.attempt import gradients_of
from training.distillation import modules_of, teach
from training.finetuning import FrozenBackbone
from training.generators import restore_generators, seed_everything
from training.memory_format import lay_out
from training.precision import LossScaler, choose_kernels
from training.ranks import SingleProcess
from training.step import Step
from training.teacher import Teacher, hash_of, read_teacher
from utils import total_norm

KERNELS = ("deterministic", "float32_matmul")  # keys that say which kernels compute, on a CPU too
CLOSE = 1e-3  # relative difference of a spike that is replayed on another device
MOST_THREADS = 4 * (os.cpu_count() or 1)  # more threads wait for each other


class ReplayError(Exception):
    """The step cannot be replayed; the message says why."""


class OutOfTime(ReplayError):
    """The time of the analysis is over: nothing more is replayed."""


@dataclass
class Outcome:
    """The result of one replayed step."""

    loss: float = math.nan
    accuracy: float = 0.0
    norm: float = math.nan
    bad_buffers: bool = False
    bad_buffer: str = ""  # the first of them, and in what way it is bad
    nonfinite_after_update: str = ""  # what the optimizer's update made non-finite
    stride: float = 0.0  # norm of that update over the norm of the weights
    error: str = ""  # the exception that the step raised
    refused: str = ""  # why an operation refused its numbers: see Step.forward_backward
    gradients: dict = field(default_factory=dict)  # statistics per parameter
    seconds: float = 0.0
    scale: float = 1.0  # loss scale of this run

    @property
    def finite(self) -> bool:
        """Whether loss, gradients, buffers and update are finite, so that the trainer takes this step."""
        computed = math.isfinite(self.loss) and math.isfinite(self.norm)
        return not self.error and computed and not self.bad_buffers and not self.by_update

    @property
    def by_update(self) -> bool:
        """Whether it fails by the optimizer's update: it makes something non-finite, or refuses its numbers."""
        return bool(self.nonfinite_after_update or (self.refused and math.isfinite(self.loss)))

    def __str__(self):
        if self.error or self.refused:
            return self.error or self.refused
        more = f", buffer {self.bad_buffer}" if self.bad_buffers else ""
        more += f", the update makes '{self.nonfinite_after_update}' non-finite" if self.nonfinite_after_update else ""
        return f"loss {self.loss:.4g}, gradient norm {self.norm:.4g}{more}"


def changed_sources(dump: dict) -> list[str]:
    """List the plug-in files that differ from the run's: changed, missing, or without a hash in the dump."""
    hashes, config = dump["source_hashes"], dump["config"]
    chosen = [pair for pair in plugins.CHOSEN_BY.items() if pair[0] != "frontend" or config.get("frontend")]
    needed = [f"{folder}/{config.get(key) or '?'}.py" for folder, key in chosen]
    needed += [f"models/{dump['teacher']['model']}.py"] if "teacher" in dump else []
    return changed_since(hashes, needed, plugins.ROOT)


def absurd_setting(config: dict, state: dict) -> str:
    """Find a whole number of model or loss that is too large for these weights: 'key: value', else ''.

    A dump may come from anyone: its configuration must not make the analysis allocate more than the state holds.
    """
    most = max(100_000, sum(t.numel() for t in state["model_state_dict"].values()))
    for folder in ("models", "frontend", "loss"):
        declared = plugins.declaration(folder, str(config.get(plugins.CHOSEN_BY[folder])))
        for key in declared.keys if declared else ():
            value = config.get(key, 0)
            if isinstance(value, int) and abs(value) > most:
                return f"{key}: {value}"
    return ""


def teacher_of(dump: dict) -> Teacher | None:
    """The teacher of the run, read again from its files; ReplayError unless they are those of the run."""
    if "teacher" not in dump:
        return None
    hashes, config = dump["teacher"]["files"], dump["config"]
    if [*hashes] != [file for file in map(config.get, ("teacher_checkpoint", "teacher_config")) if file]:
        raise ReplayError("not replayed: the configuration in the dump names other files of a teacher than the dump")
    try:
        for path, digest in hashes.items():
            if hash_of(path) != digest:
                raise ReplayError(f"not replayed: the teacher's file {path} has changed since the run")
        teacher = read_teacher(Config(**config))
        absurd = absurd_setting(teacher.config.values(), {"model_state_dict": teacher.tensors()})
    except ReplayError:
        raise
    except Exception as error:  # what a dump says of a teacher may be anything
        raise ReplayError(f"not replayed: the teacher cannot be read: {first_line(error)}") from error
    if absurd:
        raise ReplayError(f"not replayed: {absurd} of the teacher does not fit its weights")
    return teacher


class Replay:
    """The step of a format-1 dump; runs on a GPU if the dump is from one and this machine has one."""

    files = "plug-in files"  # what the dump has the hashes of

    def __init__(self, dump: dict, state: dict | None, trust_changed_code: bool = False):
        self.dump, self.state = dump, state
        changed = self.changed = self.changed_sources()
        missing = [name for name in changed if name.endswith(")")]
        if missing or (changed and not trust_changed_code):
            hint = "" if missing else "; --trust-changed-code replays with the files as they are now"
            raise ReplayError(
                f"not replayed: {self.files} differ from the run's: {', '.join(missing or changed)}{hint}"
            )
        if state is None:
            raise ReplayError("not replayed: the weights are missing (the dump's state_*.pt)")
        self.data, self.label = self.batch(), dump["label"]
        self.config = {"nPerSpeaker": self.data.shape[0], **dump["config"]}
        cuda = dump["device"].startswith("cuda")
        self.device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
        self.emulated = cuda and self.device.type == "cpu"
        if not self.emulated:
            choose_kernels(Config(**{key: self.config[key] for key in KERNELS if key in self.config}))
        self.teacher = teacher_of(dump)
        self.dtype = dump["amp_dtype"]
        # The trainer refused a finite step of finite weights: its update may be the fault, so replay that too.
        self.takes_update = dump["reason"] == "state_nonfinite" and not bad_state(state) and not dump.get("injected")
        self.deadline, self.runs = math.inf, 0  # of time.perf_counter; replays so far
        self.before_run: Callable[[int], None] | None = None
        self.steps: dict[str, Step] = {}
        self.attributes: dict[Step, dict] = {}  # what of the dump's plain attributes each step takes over
        self.nonfinite_by_design: set[str] = set()  # buffers that hold infinities from the start
        self.as_built: dict | None = None  # the plain attributes of the unchanged network before any step
        if 0 < dump["threads"] <= MOST_THREADS:
            torch.set_num_threads(dump["threads"])
        self.nonfinite_by_design = set(self.step().buffers.nonfinite_by_design)

    def changed_sources(self) -> list[str]:
        """The source files that are not those of the run."""
        return changed_sources(self.dump)

    def batch(self) -> torch.Tensor:
        """The batch (M, B, samples); ReplayError if it or the configuration cannot be used."""
        data = self.dump["data"]
        if data.ndim not in (2, 3):
            raise ReplayError(f"not replayed: data has {data.ndim} dimensions, expected 2 or 3")
        if not data.numel():
            raise ReplayError("not replayed: the dump holds no audio (nan_dump_audio: false)")
        absurd = absurd_setting(self.dump["config"], self.state)
        if absurd:
            raise ReplayError(f"not replayed: {absurd} in the configuration does not fit the saved weights")
        return data.float() if data.ndim == 3 else data.float().unsqueeze(0)

    def new_network(self, settings: dict | None = None):
        """Build the network of the run, its configuration changed by ``settings``, with fresh weights."""
        values = {**self.config, **(settings or {})}
        seed_everything(0)  # what differs between two networks is what a setting or a changed line has set
        network = SpeakerNet(values)
        if self.teacher is not None and values["teacher_checkpoint"]:
            teach(network, self.teacher, values)
        trained_on = torch.device("cuda") if self.emulated else self.device
        amp_dtype = None if self.dtype == "float32" else getattr(torch, self.dtype)
        lay_out(
            network, str(values.get("memory_format", "contiguous")), amp_dtype, trained_on
        )  # older runs knew no other
        return network

    def prepare(self, network):
        """Put a network into the mode of the step."""
        network.train()
        epochs, norms = int(number(self.config, "freeze_epochs", 0)), self.config.get("freeze_norms") is True
        FrozenBackbone(network, epochs, norms).enter(self.dump["epoch"])

    def new_optimizer(self, network, settings: dict | None = None, saved: dict | None = None):
        """Build the optimizer of the run, its configuration changed by ``settings``.

        It holds the parameters of the ``saved`` state, by default all that are trained.
        """
        config = {**self.config, "steps_per_epoch": 1, **(settings or {})}
        given: list = [p for p in network.parameters() if p.requires_grad]
        if saved is not None:
            named = dict(network.named_parameters())
            names = self.dump.get("trainable") or list(named)
            groups = [{"params": [named[names[i]] for i in group["params"]]} for group in saved["param_groups"]]
            given = groups[0]["params"] if len(groups) == 1 else groups
        return plugins.build("optimizer", config["optimizer"], config, given)

    @property
    def columns(self) -> int:
        """Rows of the batch that carry a label: B."""
        return self.data.shape[1]

    @property
    def settings(self) -> set[str]:
        """Keys that ``run`` may be given as settings."""
        return set(self.config) | plugins.all_keys()

    def forget_networks(self):
        """Build networks anew from now on: an edit may have replaced modules of those that there are."""
        self.steps.clear()
        self.step()

    def step(self, settings: dict | None = None) -> Step:
        """The trainer's step on the network with the dump's state in it, its configuration changed by ``settings``."""
        key = repr(sorted((settings or {}).items()))
        if key not in self.steps:
            try:
                network = self.new_network(settings)
            except Exception as error:  # a plug-in may raise anything
                raise ReplayError(f"not replayed: the network cannot be built: {first_line(error)}") from error
            self.steps[key] = Step(network.to(self.device), SingleProcess(self.device))
            self.attributes[self.steps[key]] = self.unchanged_attributes(self.steps[key].module_state.state_dict())
        network = self.steps[key].network
        self.load(network, self.state["model_state_dict"], strict=not settings)
        self.prepare(network)
        return self.steps[key]

    def unchanged_attributes(self, fresh: dict) -> dict:
        """The dump's plain attributes of modules, without those that a changed setting or line of code has set.

        ``fresh``: the attributes of a network as it was built; the first network that is built is the unchanged one.
        """
        if self.as_built is None:
            self.as_built = fresh
        recorded = self.dump.get("module_state", {})
        return {
            name: {
                key: value
                for key, value in entries.items()
                if repr(fresh.get(name, {}).get(key)) == repr(self.as_built.get(name, {}).get(key))
            }
            for name, entries in recorded.items()
        }

    def network(self, settings: dict | None = None) -> SpeakerNet:
        """The network of ``step``."""
        return self.step(settings).network

    @contextlib.contextmanager
    def patched(self, patch):
        """Replay with a change of a source file in force: the networks are built anew, those from before kept aside."""
        steps, attributes = self.steps, self.attributes
        self.steps, self.attributes = {}, {}
        try:
            with patch.applied():
                yield
        finally:
            self.steps, self.attributes = steps, attributes

    def fits(self, settings: dict) -> bool:
        """Whether the network with these configuration keys can be built and all of the dump's weights fit it."""
        try:
            own = self.network(settings).state_dict()
        except ReplayError:
            return False
        weights = self.state["model_state_dict"]
        return all(name in weights and weights[name].shape == tensor.shape for name, tensor in own.items())

    def load(self, network, weights: dict, strict: bool = True):
        """Copy weights into the network; with ``strict`` all must fit, else those that fit are copied.

        A buffer that was infinite from the start, and no longer is with a changed line, is left as it is made.
        """
        own = network.state_dict()
        misfits = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
        if misfits and strict:
            raise ReplayError(f"not replayed: the weights do not fit the network ({misfits[0]})")
        with torch.no_grad():
            mended = {name for name in self.nonfinite_by_design & own.keys() if bool(own[name].isfinite().all())}
            for name in own.keys() - set(misfits) - mended:
                own[name].copy_(weights[name])

    def run(self, columns=None, data=None, label=None, settings=None, dtype=None, scale=None, **more) -> Outcome:
        """Run the step once.

        ``columns`` chooses labelled rows; ``data`` (M, B, samples), ``label`` (B,), ``settings``, ``dtype`` and the
        loss ``scale`` replace the dump's. Of ``more``: ``edit(network)`` is called before the step, ``modes`` are
        context managers around forward and backward, ``islands`` are names of modules that compute in fp32, ``stats``
        True collects gradient statistics, ``after(network)`` is called after the step, with its gradients there.
        The update of a dump whose fault may be the update is taken too; ``around`` is a context manager around it,
        ``moments(optimizer)`` is called before it.
        """
        begin = time.perf_counter()
        if begin > self.deadline:
            raise OutOfTime("not tried: no time left (--seconds)")
        self.runs += 1
        if self.before_run is not None:
            self.before_run(self.runs)
        dtype = dtype or self.dtype
        for tried in [scale] if scale else self.scales(dtype):
            outcome = self.run_once(columns, data, label, settings, dtype, tried, **more)
            if outcome.finite or outcome.error or not math.isfinite(outcome.loss) or outcome.bad_buffers:
                break
        outcome.scale = tried
        outcome.seconds = time.perf_counter() - begin
        return outcome

    def scales(self, dtype: str) -> list[float]:
        """List the loss scales that the trainer tries: in fp16 lower ones too, for gradients that overflow."""
        scale = self.dump["scaler_scale"]
        if dtype != "float16" or not (scale > 0 and math.isfinite(scale)):
            return [1.0]
        scaler = LossScaler(True)
        scaler.scale = scale if scale > 1 else scaler.scale
        return [scaler.scale, *scaler.retries()]

    def run_once(self, columns, data, label, settings, dtype, scale, **more) -> Outcome:
        """``run`` at one loss scale."""
        step = self.step(settings)
        network = step.network
        batch = (self.data if data is None else data, self.label if label is None else label)
        restored = fp32_islands(network, more.get("islands", ()))
        outcome, begun = Outcome(), False
        try:
            step.module_state.load_state_dict(self.attributes[step])
            if more.get("edit"):
                more["edit"](network)
                step.renew()
            window = self.window(*batch, columns, torch.float64 if dtype == "float64" else torch.float32)
            step.amp_dtype = getattr(torch, dtype) if dtype in ("float16", "bfloat16") else None
            if dtype == "float64":
                network.double()
                step.renew()
            restore_generators(self.dump["rng_state"], self.device)
            step.begin()
            begun = True
            with contextlib.ExitStack() as stack:
                for mode in [*self.casts(dtype), *more.get("modes", ())]:
                    stack.enter_context(mode)
                step.set_epoch(self.dump.get("moment"))  # a fault of the schedule is seen by the modes too
                results = step.forward_backward(window, scale)
            attempt = step.measure(results, scale)  # no mode sees this
            outcome.loss, outcome.accuracy, outcome.norm = attempt.loss, attempt.accuracy, attempt.norm
            outcome.bad_buffers, outcome.refused = not attempt.buffers_finite, step.refused
            outcome.bad_buffer = step.buffers.first_bad() if outcome.bad_buffers else ""
            if self.takes_update and outcome.finite:
                before = [p.detach().clone() for p in network.parameters()]
                outcome.nonfinite_after_update = self.update(step, settings, outcome.norm, **more)
                outcome.refused = step.refused
                moves = [p.detach() - old for p, old in zip(network.parameters(), before)]
                outcome.stride = float(total_norm(moves) / total_norm(before).clamp(min=1e-12))
            if more.get("stats"):
                outcome.gradients = tensor_stats(gradients_of(network))
            if more.get("after") and outcome.finite:
                more["after"](network)
        except Exception as error:  # a plug-in may raise anything
            outcome.error = f"{type(error).__name__}: {first_line(error)}"
        finally:
            if begun:  # what the step made, as a memory of embeddings, is not there for the next
                step.module_state.restore()
            restored()
            if dtype == "float64":
                network.float()
                step.renew()
        return outcome

    def window(self, data, label, columns, dtype: torch.dtype = torch.float32) -> list[dict]:
        """The batches of the step: more than one with gradient accumulation, one if rows are chosen."""
        data = data.to(dtype)
        if columns is not None:
            columns = torch.as_tensor(columns)
            return [{"data": data[:, columns], "label": label[columns]}]
        sizes = self.dump.get("window") or [data.shape[1]]
        return [{"data": d, "label": lb} for d, lb in zip(data.split(sizes, dim=1), label.split(sizes))]

    def casts(self, dtype: str) -> list:
        """Function modes that replace another device's casts, or compute in float64."""
        if dtype == "float64":
            return [Casts(torch.float64)]
        return [CudaCasts(getattr(torch, dtype))] if self.emulated and dtype != "float32" else []

    def update(self, step: Step, settings, norm: float, around=None, moments=None, **others) -> str:
        """Take the optimizer's step from its saved state; return the name of the first tensor it made non-finite.

        '' too if the optimizer refuses its numbers, which ``step.refused`` then tells.
        ``settings`` that are options of the optimizer change it; another ``optimizer`` starts without moments.
        ``moments(optimizer)`` may change what it has saved.
        """
        config, saved = {**self.config, **(settings or {})}, self.state["optimizer_state_dict"]
        optimizer = self.new_optimizer(step.network, settings, saved)
        if config["optimizer"] == self.config["optimizer"]:
            optimizer.load_state_dict(copy.deepcopy(saved))  # which keeps the tensors that it is given
            for name, value in self.dump.get("optimizer_attributes", {}).items():  # a counter, for example
                if type(getattr(optimizer, name, None)) is type(value):
                    setattr(optimizer, name, value)
        for group in optimizer.param_groups:
            if len(optimizer.param_groups) == 1:  # of several each has its own, in the saved state
                group["lr"] = self.dump["lr"]
            if "lr" in (settings or {}):
                group["lr"] *= settings["lr"] / number(self.config, "lr", self.dump["lr"])
            group.update({key: value for key, value in (settings or {}).items() if key in group and key != "lr"})
            if around is not None and "fused" in group:
                group["fused"] = False  # its operations can be watched one by one
        if moments:
            moments(optimizer)
        step.set_optimizer(optimizer, number(config, "grad_clip"))
        step.try_apply(norm, around)
        watched = step.guard.watched()
        return next((name for name, tensor in watched.items() if not bool(tensor.isfinite().all())), "")

    def reproduction(self, outcome: Outcome) -> str:
        """Compare a replay of the unchanged step with the dump: bit_equal, same_fault, other_fault or vanished."""
        if self.dump["reason"] == "spike":
            pairs = [(outcome.loss, self.dump["loss"]), (outcome.norm, self.dump["grad_norm"])]
            if all(_same(*pair) for pair in pairs):
                return "bit_equal"
            return "same_fault" if all(math.isclose(*pair, rel_tol=CLOSE) for pair in pairs) else "vanished"
        if outcome.finite:
            return "vanished"
        if self.dump["reason"] in ("loss_nonfinite", "grad_nonfinite", "grad_norm_overflow") and not outcome.error:
            if math.isfinite(outcome.loss) != math.isfinite(self.dump["loss"]):
                return "other_fault"
            bad = {name for name, s in outcome.gradients.items() if s["nan"] or s["inf"]}
            recorded_bad = {name for name, s in self.dump["grad_stats"].items() if s["nan"] or s["inf"]}
            if bad and recorded_bad and not bad & recorded_bad:
                return "other_fault"
        recorded = self.dump["grad_stats"]
        same = {name: _bits(s) for name, s in recorded.items()} == {
            n: _bits(outcome.gradients.get(n, {})) for n in recorded
        }
        equal = _same(outcome.loss, self.dump["loss"]) and _same(outcome.norm, self.dump["grad_norm"])
        named = not self.dump.get("update_stats") or outcome.nonfinite_after_update in self.dump["update_stats"]
        return "bit_equal" if (recorded or outcome.refused) and same and equal and named else "same_fault"


def fp32_islands(network, names):
    """Let the modules of these names compute in fp32 under autocast; returns a function that undoes it."""
    chosen = [(module, module.forward) for name, module in modules_of(network) if name in names]

    def in_fp32(forward):
        def wrapped(self, *inputs, **named):
            with torch.autocast(
                next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu"), enabled=False
            ):
                return forward(*(x.float() if _is_float(x) else x for x in inputs), **named)

        return wrapped

    for module, forward in chosen:
        module.forward = types.MethodType(in_fp32(forward), module)

    def undo():
        for module, _ in chosen:
            del module.forward

    return undo


def _is_float(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _bits(stats: dict) -> tuple:
    return tuple(repr(stats.get(key)) for key in ("nan", "inf", "abs_max", "norm"))
