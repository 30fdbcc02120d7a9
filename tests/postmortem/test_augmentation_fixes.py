"""The line of an augmentation that makes NaN, and a change of it, with which the rows are made again."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from programs import ROOT

from corpus.augmentation import Augment, Augmented
from corpus.crop import Crop
from corpus.sounds import Surroundings
from errors import UsageError
from postmortem import source_patch
from postmortem.augmentation_fixes import change_of_line, changes_of_line, keys_of, line_at_fault, remade
from postmortem.source_patch import SourcePatch

GAIN = """
import numpy as np


class Augmentation:
    def __init__(self, db=(-30, -20)):
        self.db = db

    def draw(self, x, rng, sounds):
        level = 10 * np.log10(np.mean(x.astype(np.float64) ** 2))
        return {"gain_db": float(rng.uniform(*self.db) - level)}

    @staticmethod
    def apply(x, draw, sounds):
        if "peak" in draw:
            peak = np.abs(x).max()
            return (draw["peak"] * x / peak).astype(np.float32)
        return x * np.float32(10 ** (draw["gain_db"] / 20))
"""
DIVIDES, TAKES_A_LOGARITHM = 17, 10  # lines of it


@pytest.fixture
def case(tmp_path):
    """Two rows, a silent one at fault and a sound one; gain.py is another plug-in while the test lasts."""
    rng, files = np.random.default_rng(0), []
    for name, level in (("silent", 0.0), ("sound", 0.1)):
        soundfile.write(tmp_path / f"{name}.wav", level * rng.normal(size=8000), 16000, subtype="FLOAT")
        files.append(Crop(str(tmp_path / f"{name}.wav")).to_dict())
    data = torch.zeros(1, 2, 8000)
    made = SimpleNamespace(dump={"data": data}, files=files, config={"augmentation": [{"gain": {"db": [-9, -9]}}]})
    made.time_left = lambda: 1.0
    made.replay = SimpleNamespace(data=data, run=lambda data: SimpleNamespace(finite=bool(data.isfinite().all())))
    path = "augmentation/gain.py"
    with SourcePatch(path, (ROOT / path).read_text(encoding="utf-8"), GAIN).applied():
        yield made


def patched_twice(monkeypatch):
    """Changes are made to the text of the other plug-in."""
    monkeypatch.setattr(
        "postmortem.augmentation_fixes.path_of", lambda place: SimpleNamespace(read_text=lambda **k: GAIN)
    )
    assert source_patch.path_of("augmentation/gain.py")


def test_a_line_that_divides_by_zero_is_found_and_changed(case, monkeypatch):
    patched_twice(monkeypatch)
    for info in case.files:
        info["augment"] = [{"kind": "gain", "peak": 0.5}]
    place, said = line_at_fault(case, 0)
    assert place == f"augmentation/gain.py:{DIVIDES}" and "FloatingPointError: invalid value" in said
    assert line_at_fault(case, 1) == ("", "")
    found = change_of_line(case, SimpleNamespace(source=place, rows=[0]))
    assert "peak, 1e-6)" in found.patch.after and "1 sound row" in found.outcome


def test_a_draw_that_is_not_finite_is_drawn_anew(case, monkeypatch):
    patched_twice(monkeypatch)
    case.files[0]["augment"] = [{"kind": "gain", "gain_db": float("inf")}]
    case.files[1]["augment"] = [{"kind": "gain", "gain_db": 3.0}]
    place, said = line_at_fault(case, 0)
    assert place == f"augmentation/gain.py:{TAKES_A_LOGARITHM}" and "divide by zero" in said
    level = 20 * np.log10(np.sqrt(np.mean(remade(case, 1, anew=True) ** 2)))
    assert level == pytest.approx(-9.0, abs=0.01)
    found = change_of_line(case, SimpleNamespace(source=place, rows=[0]))
    assert "np.log10(max(" in found.patch.after and "1 sound row" in found.outcome


def test_a_draw_that_was_refused_is_made_with_another_line(case, monkeypatch):
    patched_twice(monkeypatch)
    case.replay = None  # the step was taken without it
    reason = f"augmentation/gain.py:{TAKES_A_LOGARITHM}: ValueError: math domain error"
    case.files[0]["augment"] = [{"kind": "gain", "path": "augmentation/gain.py", "reason": reason}]
    case.files[1]["augment"] = [{"kind": "gain", "gain_db": 3.0}]
    place = f"augmentation/gain.py:{TAKES_A_LOGARITHM}"
    (fix,) = changes_of_line(case, SimpleNamespace(source=place, rows=[0]))
    assert fix["verdict"] == "verified" and "np.log10(max(" in fix["change"]["diff"]
    assert fix["outcome"] == "1 row made again with it; 1 sound row with this augmentation as before"


def test_a_plug_in_that_refuses_the_numbers_of_a_crop_leaves_it_as_it_is():
    """As one that looks for the first loud sample of silence; a mistake in it still ends the run."""
    path, sounds = "augmentation/gain.py", Surroundings({}, [], None, None)
    text, first = (ROOT / path).read_text(encoding="utf-8"), "int(np.flatnonzero(x)[0])"
    draws = f'        return {{"peak": {first}}}\n\n'
    trims = GAIN[: GAIN.index("        level")] + draws + GAIN[GAIN.index("    @static") :]
    silence, loud = np.zeros(100, np.float32), np.ones(100, np.float32)
    with SourcePatch(path, text, trims).applied():
        plugin = Augment("gain", {}, 16000)
        plugin.try_out(loud, sounds)
        for x in (silence, loud):
            crop = Augmented(x, sounds)
            plugin.augment(crop, np.random.default_rng(0))
            assert crop.x is x or x is loud
            assert ["reason" in draw for draw in crop.draws] == [x is silence]
        with pytest.raises(UsageError, match="it was tried, and fails: augmentation/gain"):
            plugin.try_out(silence, sounds)
    assert [event[:2] for event in sounds.unusable] == [("augmentation", path)]
    assert "augmentation/gain.py:10: IndexError: index 0 is out of bounds" in sounds.unusable[0][2]
    with SourcePatch(path, text, trims.replace(first, "{}[0]")).applied(), pytest.raises(KeyError):
        Augment("gain", {}, 16000).augment(Augmented(loud, sounds), np.random.default_rng(0))


def test_the_keys_of_a_plug_in_are_found_at_any_depth():
    policy = [{"one_of": {"p": 0.5, "of": [{"noise": {}}, {"gain": {"db": [1, 2], "p": 0.1}}]}}]
    assert keys_of(policy, "gain") == {"db": [1, 2]} and keys_of(policy, "reverb") == {} == keys_of(None, "gain")
