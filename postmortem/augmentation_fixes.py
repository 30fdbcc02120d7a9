"""The line of an augmentation that makes NaN or Inf, and fixes: rows are made again from their files with each."""

import numpy as np
import torch

from corpus.audio import AudioError
from corpus.augmentation import KINDS, ONE_OF, apply_draws, plugin_of, rate_for, source_of, values_of_dumps
from corpus.crop import Crop
from corpus.sounds import Surroundings
from errors import plural
from postmortem.code_fixes import TOLERANCE, TRIALS, CodeFix
from postmortem.places import path_of
from postmortem.probe import Record, Site
from postmortem.rewrites import rewrites
from postmortem.source_patch import SourcePatch
from postmortem.trials import attempt, recommendation
from settings import plugins
from storage.dump import rows_of

LOUDEST = 1e4  # |sample| that no recording in [-1, 1] has
MOST_SOUND = 8  # sound rows that a change must leave as they are


def for_augmentation(case, finding) -> list[dict]:
    """Try the rows rebuilt without the impulse responses, noise files and plug-ins at fault, and with another line."""
    paths = list(dict.fromkeys(f["path"] for f in finding.files))
    text = f"repair, or remove from its folder: {', '.join(paths)}"
    action, change = "exclude_file", {"file": paths[0]} if len(paths) == 1 else {"files": paths}
    if all(path.startswith("augmentation/") and path.endswith(".py") for path in paths):
        text = f"repair, or take out of the policy (augmentation), or lower its keys: {', '.join(paths)}"
        action, change = "none", None
    if case.dump.get("reason") == "data_error":
        outcome = "the run left it out of this batch, and the step was finite"
        return [recommendation(text, action, change, True, outcome), *changes_of_line(case, finding)]
    if case.replay is None:
        return [recommendation(text, action, change, None, case.refusal)]
    flat = rows_of(case.dump["data"]).float().clone()
    for row in finding.rows:
        info = case.files[row]
        kept = [d for d in info.get("augment", []) if source_of(d) not in paths]
        try:
            flat[row] = torch.from_numpy(Crop.from_dict({**info, "augment": kept}).load(flat.shape[1])[1])
        except (AudioError, OSError) as error:
            return [recommendation(text, action, change, None, f"row {row} cannot be rebuilt: {error}")]
    left_out = attempt(case, text, action, change, data=flat.view_as(case.replay.data))
    return [left_out, *changes_of_line(case, finding)]


def changes_of_line(case, finding) -> list[dict]:
    """Look for a change of the line at fault; without one say what a person can do there. [] if no line is known."""
    if not finding.source:
        return []
    found = change_of_line(case, finding)
    if found is None:
        text = f"{finding.source}: keep what this line reads inside its bounds"
        return [recommendation(text, "fix_code", None, None, "no change is known")]
    text = f"{finding.source}: {'; '.join(found.words)}"
    return [recommendation(text, "fix_code", {"diff": found.patch.diff()}, True, found.outcome)]


def keys_of(policy, kind: str) -> dict:
    """The keys of a plug-in in a policy; {} if it does not name it."""
    for entry in policy if isinstance(policy, list) else ():
        for name, keys in entry.items() if isinstance(entry, dict) else ():
            given = keys if isinstance(keys, dict) else {}
            if name == ONE_OF and keys_of(given.get("of"), kind):
                return keys_of(given.get("of"), kind)
            if name == kind:
                return {key: value for key, value in given.items() if key != "p"}
    return {}


def is_bad(draw: dict) -> bool:
    """Whether a draw holds a number that is not finite."""
    return any(isinstance(value, float) and not np.isfinite(value) for value in draw.values())


def remade(case, row: int, anew: bool = False) -> np.ndarray:
    """A row (samples,) made again from its files.

    A draw that is not finite, or is missing, is drawn ``anew``, or if so all are, always from the same numbers.
    AudioError if that is not possible; as its cause, what numpy says if it is told to raise exceptions.
    """
    crop = Crop.from_dict(case.files[row])
    x = Crop.from_dict({**case.files[row], "augment": []}).load(case.dump["data"].shape[-1])[0]
    for draw in crop.augment:
        refused = str(draw.get("path")).endswith(".py")  # by the plug-in, which has no draw then
        if "reason" in draw and not refused:
            continue
        drawn = [draw]
        if anew or refused or is_bad(draw):
            with values_of_dumps(f"the draw of '{draw['kind']}'"):
                made = plugin_of(draw["kind"])
                keys = keys_of(case.config.get("augmentation"), KINDS.get(draw["kind"], draw["kind"]))
                plugin = made(**keys, **rate_for(made, crop.sample_rate))
                nothing = Surroundings({}, [], None, None, crop.sample_rate)
                found = plugin.draw(x, np.random.default_rng(0), nothing)
            drawn = [{"kind": draw["kind"], **each} for each in (found if isinstance(found, list) else [found])]
        x = apply_draws(x, drawn, crop.sample_rate)
    return x


def line_at_fault(case, row: int) -> tuple[str, str]:
    """(the line of a plug-in that makes a row NaN or Inf, what numpy says there); ('', '') if numpy says nothing."""
    for over in ("ignore", "raise"):  # an infinity may be meant; 0/0 is not
        try:
            with np.errstate(divide="raise", invalid="raise", over=over, under="ignore"):
                remade(case, row)
        except AudioError as error:
            cause = error.__cause__
            if isinstance(cause, ArithmeticError) and plugins.place(cause):
                return plugins.place(cause), f"{type(cause).__name__}: {cause}"
        except OSError:
            pass
    return "", ""


def uses(info: dict, path: str) -> bool:
    """Whether the plug-in of a file was applied to a row."""
    return any(f"augmentation/{KINDS.get(d['kind'], d['kind'])}.py" == path for d in Crop.from_dict(info).draws)


def change_of_line(case, finding) -> CodeFix | None:
    """Return the first change of the line with which the rows at fault are sound and the others what they were."""
    path, _, number = finding.source.rpartition(":")
    text, guilty = path_of(path).read_text(encoding="utf-8"), finding.rows
    anew = case.replay is None or any(is_bad(d) for row in guilty for d in Crop.from_dict(case.files[row]).draws)
    others = [row for row, info in enumerate(case.files) if row not in guilty and uses(info, path)][:MOST_SOUND]
    refused = Record("", "", Site("", finding.source), False, True, False, [], 0, "float32", refusal="of numpy")
    with np.errstate(all="ignore"):
        try:
            before = [remade(case, row, anew) for row in others]
        except (AudioError, OSError):
            return None
        for words, after in rewrites(text, int(number), refused)[:TRIALS]:
            if case.time_left() < 0:
                return None
            patch = SourcePatch(path, text, after)
            try:
                with patch.applied():
                    rows = [remade(case, row, anew) for row in guilty]
                    now = [remade(case, row, anew) for row in others]
            except (AudioError, OSError):
                continue
            sound = all(np.isfinite(x).all() and np.abs(x).max() <= LOUDEST for x in rows)
            if not sound or any(np.abs(x - y).max() > TOLERANCE * np.abs(x).max() for x, y in zip(before, now)):
                continue
            kept = f"; {plural(len(others), 'sound row')} with this augmentation as before" if others else ""
            if case.replay is None:  # the step was taken without the augmentation
                return CodeFix(patch, [words], f"{plural(len(rows), 'row')} made again with it{kept}")
            flat = rows_of(case.dump["data"]).float().clone()
            flat[guilty] = torch.from_numpy(np.stack(rows))
            outcome = case.replay.run(data=flat.view(case.replay.data.shape))
            if outcome.finite:
                return CodeFix(patch, [words], f"rows made again with it: {outcome}{kept}")
    return None
