"""Augmentation of training crops: a policy of plug-ins of augmentation/, each draw of which is recorded.

An entry of a policy is {name of a plug-in: {p: share of the crops, keys of the plug-in}}. They act one after another;
{one_of: {p: .., of: [entries]}} takes one of several, each as likely as the others.
"""

import contextlib
import functools
import importlib
import inspect
from pathlib import Path

import numpy as np

from augmentation.operations import OnDevice, Operation, can_wait
from config import SAMPLE_RATE
from corpus.audio import AudioError
from corpus.folders import find_recordings
from corpus.plain import plain
from corpus.sound_pack import UNCACHED, packed
from corpus.sounds import Files, Surroundings
from errors import ROOT, UsageError, first_line, refuses_numbers, with_place

CATEGORIES = ("noise", "speech", "music")  # folders of musan_path
ONE_OF = "one_of"
RATE = "sample_rate"  # argument of a plug-in that is told the rate
KINDS = {"speech": "babble"}  # plug-ins that record their draws under another name


def find_noise(musan_path) -> dict[str, list[str]]:
    """Find recordings below ``musan_path`` by the folder noise, speech or music they lie in, at any depth."""
    found = {category: [] for category in CATEGORIES}
    root = Path(musan_path)
    for path in find_recordings(root):
        for part in path.relative_to(root).parts[:-1]:
            if part in found:
                found[part].append(str(path))
                break
    return found


def find_rirs(rir_path) -> list[str]:
    """Find impulse responses: the recordings below ``rir_path`` at any depth."""
    return [str(path) for path in find_recordings(rir_path)]


def usual_policy(noise: dict, rirs: list, probability: float) -> list[dict]:
    """The policy of ``augment`` and ``augment_prob``: one of the kinds for which there are files."""
    kinds = [{"reverb": {"align": False}}] if rirs else []
    kinds += [{KINDS.get(category, category): {}} for category in noise]
    return [{ONE_OF: {"p": probability, "of": kinds}}]


class PolicyError(UsageError):
    """An entry of a policy that cannot be used; ``entry`` is its number in the list."""

    def __init__(self, text: str, entry: int):
        super().__init__(text)
        self.entry = entry


@contextlib.contextmanager
def of_entry(number: int):
    """Turn a UsageError into the PolicyError of an entry."""
    try:
        yield
    except UsageError as error:
        raise PolicyError(str(error), number) from error


class AugmentWAV:
    """Augments crops at ``sample_rate`` by a ``policy``, the usual one if it is empty.

    ``cache``: the folder for packs of the files, UNCACHED to read the files themselves.
    """

    def __init__(
        self,
        musan_path,
        rir_path,
        probability: float = 0.8,
        cache: str = UNCACHED,
        policy: list | None = None,
        sample_rate: int = SAMPLE_RATE,
    ):
        noise = find_noise(musan_path) if musan_path else {}
        rirs = find_rirs(rir_path) if rir_path else []
        if rir_path and not rirs:
            raise UsageError(f"rir_path: no recording below '{rir_path}'")
        if not policy:
            for category, found in noise.items():
                if not found:
                    raise UsageError(f"musan_path: no recording in a folder '{category}' below '{musan_path}'")
            if not noise and not rirs:
                raise UsageError("augment: needs musan_path or rir_path")
        self.steps = []
        for number, entry in enumerate(policy or usual_policy(noise, rirs, probability)):
            with of_entry(number):
                self.steps.append(step_of(entry, sample_rate))
        files = [path for found in noise.values() for path in found]
        wanted = {category for step in self.steps for category in step.categories()}
        pack = packed(musan_path, files, "mix", cache, sample_rate) if wanted & noise.keys() else None
        rir_pack = packed(rir_path, rirs, "1", cache, sample_rate) if "rir" in wanted else None
        self.sounds = Surroundings(noise, rirs, pack, rir_pack, sample_rate)
        for number, step in enumerate(self.steps):
            with of_entry(number):
                step.check(self.sounds)

    def try_out(self):
        """Apply each step once, with noise in the place of each recording; PolicyError if one cannot be applied."""
        x = np.random.default_rng(0).normal(0, 0.1, self.sounds.sample_rate // 2).astype(np.float32)
        for number, step in enumerate(self.steps):
            with of_entry(number):
                step.try_out(x, self.sounds.untouched())

    def augment(self, x: np.ndarray, rng: np.random.Generator):
        """Return (x augmented (samples,) float32, list of draws, list of (event kind, file, reason) of unusable files).

        A draw that could not be used has a ``reason``.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            crop = self.begun(x, rng, waits=False)
        return crop.x, crop.draws, self.sounds.unusable

    def begun(self, x: np.ndarray, rng: np.random.Generator, waits: bool = True) -> "Augmented":
        """Draw as ``augment`` does; if it ``waits``, a device is left all behind the last plug-in that it cannot do.

        The caller looks for NaN and Inf, and lets numpy ignore them.
        """
        self.sounds.unusable = []
        self.sounds.kept.clear()
        crop = Augmented(x, self.sounds, waits)
        for step in self.steps:
            step.augment(crop, rng)
        return crop

    def host_only(self) -> tuple[list[str], bool]:
        """Names of the plug-ins that a device cannot stand in for, and whether there are others."""
        plugins = [(part.name, can_wait(type(part.plugin))) for step in self.steps for part in step.parts()]
        return list(dict.fromkeys(name for name, able in plugins if not able)), any(able for _, able in plugins)


class Augmented:
    """A crop with what has been drawn for it: ``x`` (samples,) float32, and what is ``waiting`` for a device.

    Of a chain of plug-ins those wait that stand behind the last one which the device cannot do.
    """

    def __init__(self, x: np.ndarray, sounds: Surroundings, waits: bool = False):
        self.x, self.sounds, self.waits = x, sounds, waits
        self.draws: list[dict] = []
        self.waiting: list[tuple[OnDevice, list[dict]]] = []

    def act(self, name: str, plugin, rng: np.random.Generator):
        """Draw with a plug-in, and apply its draws or let them wait."""
        waits = self.waits and can_wait(type(plugin))
        if not waits:
            self.catch_up()
        drawn = plugin.choose(len(self.x), rng, self.sounds) if waits else plugin.draw(self.x, rng, self.sounds)
        listed = drawn if isinstance(drawn, list) else [drawn]
        if not all(isinstance(draw, dict) for draw in listed):
            raise ValueError(f"augmentation '{name}': draw must return a dict or a list of dicts, not {drawn!r:.40}")
        draws = [{"kind": name, **plain(draw)} for draw in listed]
        self.draws += draws
        if not waits:
            self.apply(plugin, draws)
            return
        if not self.waiting:  # else the waveform that it is to be measured on is not there yet
            plugin.measure(self.x, draws, self.sounds)
        self.waiting.append((plugin, draws))

    def act_if_possible(self, name: str, plugin, rng: np.random.Generator):
        """``act``; a plug-in that refuses the numbers of this crop leaves it as it is, and a ``reason`` in its draw."""
        before, count = self.x, len(self.draws)
        try:
            self.act(name, plugin, rng)
        except Exception as error:  # of a plug-in
            if self.waits or not refuses_numbers(error):
                raise
            path, reason = f"augmentation/{name}.py", with_place(error)
            self.x, self.draws[count:] = before, [{"kind": name, "path": path, "reason": reason}]
            self.sounds.unusable.append(("augmentation", path, reason))

    def apply(self, plugin, draws: list[dict]):
        """Apply draws."""
        for draw in draws:
            if "reason" not in draw:
                self.x = applied(plugin, self.x, draw, self.sounds)

    def catch_up(self) -> np.ndarray:
        """Do here after all what waits; returns x, with the bits that it has if nothing ever waits."""
        if not self.waiting:
            return self.x
        waiting, self.waiting = self.waiting, []
        for number, (plugin, draws) in enumerate(waiting):
            if number:
                plugin.measure(self.x, draws, self.sounds)
            self.apply(plugin, draws)
        return self.x

    def operations(self) -> tuple[list[list[tuple[Operation, int]]], float]:
        """What waits, a list for each plug-in of (operation, number of its draw); and the factor that samples grow by.

        After each operation the largest sample of the row is at most so many times that of x.
        """
        if not self.waiting:
            return [], 1.0
        stages, growth, most, number = [], 1.0, 1.0, len(self.draws) - sum(len(draws) for _, draws in self.waiting)
        for plugin, draws in self.waiting:
            stage = []
            for draw in draws:
                if "reason" not in draw:
                    operation = plugin.operation(draw, len(self.x), self.sounds)
                    growth *= operation.growth(len(self.x), draw)
                    most = max(most, growth)
                    stage.append((operation, number))
                number += 1
            stages += [stage] if stage else []
        return stages, most


class Augment:
    """One plug-in of a policy, which acts on the share ``p`` of the crops."""

    def __init__(self, name: str, keys: dict, sample_rate: int):
        self.name, self.p = name, keys.get("p", 1.0)
        own = {key: value for key, value in keys.items() if key != "p"}
        try:
            plugin = plugin_of(name)
            self.plugin = plugin(**own, **rate_for(plugin, sample_rate))
        except ValueError as error:  # what a plug-in refuses, in its own words
            raise UsageError(f"augmentation: {name}: {error}") from error

    def categories(self) -> set[str]:
        """The kinds of recordings that the plug-in wants."""
        return {self.plugin.category} if getattr(self.plugin, "category", "") else set()

    def check(self, sounds: Surroundings):
        """UsageError if there are no recordings that the plug-in wants."""
        for category in self.categories():
            if sounds.count(category):
                continue
            where = "rir_path" if category == "rir" else f"musan_path with recordings in a folder '{category}'"
            raise UsageError(f"augmentation: {self.name} needs {where}")

    def try_out(self, x, sounds: Surroundings):
        """Draw and apply twice, whatever the share; UsageError if that raises anything, gives NaN or differs."""
        kept = [x.copy(), x.copy()]
        one, other = (Augmented(own, sounds) for own in kept)
        try:
            for crop in (one, other):
                with np.errstate(all="ignore"):
                    crop.act(self.name, self.plugin, np.random.default_rng(0))
        except Exception as error:  # a plug-in may raise anything
            raise UsageError(f"augmentation: {self.name}: it was tried, and fails: {with_place(error)}") from error
        if not np.array_equal(kept, [x, x]):  # what was read is needed once more if NaN come out
            raise UsageError(f"augmentation: {self.name}: it changes the crop that it is given; work on x.copy()")
        if not np.isfinite(one.x).all():
            raise UsageError(f"augmentation: {self.name}: it gives NaN or Inf for noise of a level of {x.std():.2g}")
        if one.draws != other.draws or not np.array_equal(one.x, other.x):
            raise UsageError(f"augmentation: {self.name}: gives something else each time; draw from rng alone, in draw")

    def parts(self) -> list["Augment"]:
        """The plug-ins of the entry."""
        return [self]

    def augment(self, crop: Augmented, rng):
        """Draw and apply on the share of the crops."""
        if self.p >= 1 or rng.random() < self.p:
            crop.act_if_possible(self.name, self.plugin, rng)


class OneOf:
    """One of several entries, on the share ``p`` of the crops."""

    def __init__(self, keys: dict, sample_rate: int):
        self.p, self.steps = keys.get("p", 1.0), [step_of(entry, sample_rate) for entry in keys["of"]]

    def categories(self) -> set[str]:
        """As that of ``Augment``."""
        return set().union(*(step.categories() for step in self.steps))

    def check(self, sounds: Surroundings):
        """As that of ``Augment``."""
        for step in self.steps:
            step.check(sounds)

    def try_out(self, x, sounds: Surroundings):
        """As that of ``Augment``, of each entry."""
        for step in self.steps:
            step.try_out(x, sounds)

    def parts(self) -> list[Augment]:
        """As that of ``Augment``."""
        return [part for step in self.steps for part in step.parts()]

    def augment(self, crop: Augmented, rng):
        """As that of ``Augment``."""
        if rng.random() < self.p:
            self.steps[rng.integers(len(self.steps))].augment(crop, rng)


def step_of(entry: dict, sample_rate: int) -> Augment | OneOf:
    """Make what acts for an entry of a policy."""
    ((name, keys),) = entry.items()
    return OneOf(keys, sample_rate) if name == ONE_OF else Augment(name, keys, sample_rate)


def rate_for(function, sample_rate: int) -> dict[str, int]:
    """The keyword argument with which a function of a plug-in is told the rate: {} if its signature names none."""
    return {RATE: sample_rate} if _names_rate(getattr(function, "__func__", function)) else {}


@functools.lru_cache(maxsize=1024)
def _names_rate(function) -> bool:
    return RATE in inspect.signature(function).parameters


def plugin_of(kind: str):
    """The class of the plug-in that makes draws of a kind; AudioError if there is none, as of a dump from elsewhere."""
    name = KINDS.get(kind, kind)
    if not name.isidentifier() or not (ROOT / "augmentation" / f"{name}.py").is_file():
        raise AudioError(f"no plug-in 'augmentation/{name}.py'")
    found = getattr(importlib.import_module(f"augmentation.{name}"), "Augmentation", None)
    if found is None:
        raise AudioError(f"augmentation/{name}.py does not define Augmentation")
    return found


def applied(plugin, x: np.ndarray, draw: dict, sounds) -> np.ndarray:
    """Apply a draw; ValueError if that changes the length or the type of the crop."""
    y = plugin.apply(x, draw, sounds, **rate_for(plugin.apply, sounds.sample_rate))
    if getattr(y, "shape", None) != x.shape or y.dtype != np.float32:
        got = f"{y.dtype} {y.shape}" if isinstance(y, np.ndarray) else type(y).__name__
        raise ValueError(f"augmentation '{draw['kind']}': apply returned {got}, not float32 {x.shape}")
    return y


@contextlib.contextmanager
def values_of_dumps(what: str):
    """Turn whatever values of a dump raise, which may hold anything, into an AudioError on ``what``."""
    try:
        yield
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # RuntimeError: libsndfile's
        raise AudioError(f"{what} cannot be made again: {type(error).__name__}: {first_line(error)}") from error


def apply_draws(x: np.ndarray, draws: list[dict], sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Augment a clean crop (samples,) again as its recorded draws say; AudioError if that is not possible."""
    files = Files(sample_rate)
    for draw in draws:
        if "reason" not in draw:  # else it could not be used then either
            with values_of_dumps(f"the draw of '{draw.get('kind')}'"):
                x = applied(plugin_of(draw["kind"]), x, draw, files)
    return x


def source_of(draw: dict) -> str:
    """The file of a draw, else its plug-in."""
    return draw.get("path") or f"augmentation/{KINDS.get(draw['kind'], draw['kind'])}.py"


def first_at_fault(x: np.ndarray, draws: list[dict], sample_rate: int, limit: float = np.inf) -> str:
    """``source_of`` the first draw that brings samples not finite, or above ``limit``, into a crop (samples,)."""
    used = [draw for draw in draws if "reason" not in draw]
    for draw in used:
        with np.errstate(over="ignore", invalid="ignore"):
            x = apply_draws(x, [draw], sample_rate)
            if not (np.isfinite(x) & (np.abs(x) <= limit)).all():
                return source_of(draw)
    return source_of(used[-1]) if used else "augmentation"
