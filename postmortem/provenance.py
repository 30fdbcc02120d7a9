"""Rebuild a row of a dump from its files: shows whether file, augmentation or neither brought the bad samples."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.audio import AudioError, read_blocks
from corpus.augmentation import CATEGORIES, KINDS, apply_draws, first_at_fault, source_of
from corpus.crop import Crop
from errors import ROOT
from settings.user_code import changed_since
from storage.dump import rows_of


@dataclass
class Origin:
    """What brought a row's bad samples: 'input', 'augmentation', 'environment', or 'unknown' without the files."""

    cause: str
    path: str
    sample: int | None  # in the file, counted at the file's own rate
    text: str


def rows_with_known_code(dump: dict, trust: bool) -> list[dict]:
    """The provenance of a dump's rows; one whose augmentation is not the run's code says so, and is not made again.

    A plug-in of augmentation/ runs only if its hash is that of the dump, as every plug-in. Dumps from before there
    were such plug-ins name none; what they could draw is known.
    """
    hashes = {
        name: digest for name, digest in dump.get("source_hashes", {}).items() if name.startswith("augmentation/")
    }
    known = set() if hashes else {"reverb", *CATEGORIES}
    rows, told = [], {}
    for info in dump.get("files", []):
        for kind in dict.fromkeys(str(draw.get("kind")) for draw in Crop.from_dict(info).draws):
            if kind not in told:
                name = f"augmentation/{KINDS.get(kind, kind)}.py"
                own = {name: hashes[name]} if name in hashes else {}
                changed = [] if trust or kind in known else changed_since(own, [name], ROOT)
                told[kind] = f"{changed[0]} differs from the run's" if changed else ""
            if told[kind]:
                info = {**info, "refused": f"{told[kind]}; --trust-changed-code runs it"}
        rows.append(info)
    return rows


def bad_samples(row: np.ndarray, limit: float = np.inf) -> np.ndarray:
    """Indices of samples that are not finite, or above a limit."""
    with np.errstate(invalid="ignore"):
        return np.flatnonzero(~np.isfinite(row) | (np.abs(row) > limit))


def origin_of(row: np.ndarray, info: dict, limit: float = np.inf) -> Origin:
    """Trace the bad samples of a row, those not finite or above ``limit``, through its provenance."""
    wrong = bad_samples(row, limit)
    crop = Crop.from_dict(info)
    guess = crop.sample_in_file(int(wrong[0])) if len(wrong) else None
    draws = crop.draws
    try:
        clean, mixed = crop.load(len(row))
    except (AudioError, OSError) as error:
        sample = None if any(d.get("kind") == "reverb" for d in draws) else guess
        return Origin(
            "unknown", info["path"], sample, f"{info['path']} cannot be read here ({error}), so its row was not rebuilt"
        )
    own = bad_samples(clean, limit)
    if len(own):
        sample, value = first_in_file(info["path"], int(info["start"]), limit)
        sample = crop.sample_in_file(int(own[0])) if sample is None else sample
        value = clean[own[0]] if value is None else value
        shown = f"{value:.4g}".replace("nan", "NaN").replace("inf", "Inf")
        return Origin("input", info["path"], sample, f"{info['path']} has {shown} at sample {sample}")
    for draw in draws:
        if len(bad_samples(alone(clean, draw, crop.sample_rate), limit)):
            path, sample = source_of(draw), first_bad_sample(draw) if "path" in draw else None
            text = f"{info['path']} is fine; the {draw['kind']} augmentation {path} brings the bad samples"
            return Origin("augmentation", path, sample, text)
    if len(bad_samples(mixed, limit)):
        text = f"{info['path']} and each augmentation alone are fine; mixed, they give bad samples"
        return Origin("augmentation", first_at_fault(clean, draws, crop.sample_rate, limit), None, text)
    text = f"{info['path']}, rebuilt with the same augmentation, is fine; the row in the batch is not"
    return Origin("environment", info["path"], guess, text)


def alone(clean: np.ndarray, draw: dict, sample_rate: int) -> np.ndarray:
    """The clean crop with one draw; as it is if that takes only what the draws before it gave."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return apply_draws(clean, [draw], sample_rate)
    except AudioError:
        return clean


ROUNDING = 1e-4  # of the largest sample: a device sums in another order (augment_on)


def same_as_files(data, files: list[dict], rows, rounded: bool = False) -> bool | None:
    """Whether rows equal what their files give; None if one of the files cannot be read here.

    ``rounded``: whether they were augmented on a device, whose samples have other last bits.
    """
    flat = rows_of(data)
    if not files:
        return None
    for row in rows:
        try:
            _, mixed = Crop.from_dict(files[row]).load(flat.shape[1])
        except (AudioError, OSError):
            return None
        given = flat[row].float().numpy()
        if rounded and np.isfinite(mixed).all():
            same = bool(np.abs(mixed - given).max() <= ROUNDING * np.abs(mixed).max())
        else:
            same = np.array_equal(mixed, given, equal_nan=True)
        if not same:
            return False
    return True


def first_bad_sample(entry: dict) -> int | None:
    """The first sample of an entry's file that is not finite; None if there is none, or no file."""
    return first_in_file(entry["path"])[0]


def first_in_file(path, start: int = 0, limit: float = np.inf) -> tuple[int | None, float | None]:
    """The first bad sample of a file from ``start`` on, counted at its own rate, else before it: (number, value)."""
    found, done = None, 0
    try:
        if not Path(path).is_file():
            return None, None
        for _, block in read_blocks(path):
            for index in bad_samples(np.abs(block).max(axis=1), limit):
                place = done + int(index)
                if found is None or (found[0] < start <= place):
                    found = place, float(block[index].flat[np.argmax(~(np.abs(block[index]) <= limit))])
                if place >= start:
                    return found
            done += len(block)
    except AudioError:
        return found or (None, None)
    return found or (None, None)
