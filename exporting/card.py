"""The model card beside an export: what is really known of a model, and what is not, in Markdown."""

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from config import KEYS
from errors import UsageError
from exporting.formats import NAMES
from exporting.forms import FORMS, speech_like
from settings import plugins
from settings.carried import keys_of_front_end, keys_of_training
from settings.reader import read_yaml
from storage.files import write_atomically

MARK = "<!-- model card by export.py -->"  # a file without it is not ours to replace
LICENCE = "Not stated. Whoever publishes this file writes it here; a new export keeps what stands here."
CROP = 2.0  # seconds of the recording that multiply-adds are counted for
UNKNOWN = "unknown"
FAITHFUL = 1e-3  # difference from PyTorch up to which figures and thresholds are also those of the file

USE = {
    ".onnx": """import onnxruntime, soundfile
wave, rate = soundfile.read("A.wav", dtype="float32")  # one channel, {rate} Hz, in [-1, 1]
embedding = onnxruntime.InferenceSession("{file}").run(None, {{"waveform": wave[None]}})[0][0]""",
    ".pt": """import soundfile, torch
wave, rate = soundfile.read("A.wav", dtype="float32")  # one channel, {rate} Hz, in [-1, 1]
embedding = torch.jit.load("{file}")(torch.from_numpy(wave)[None])[0]""",
    ".pt2": """import soundfile, torch
wave, rate = soundfile.read("A.wav", dtype="float32")  # one channel, {rate} Hz, in [-1, 1]
embedding = torch.export.load("{file}").module()(torch.from_numpy(wave)[None])[0]""",
}
USE_FEATURES = {
    ".onnx": """import onnxruntime
session = onnxruntime.InferenceSession("{file}")
embedding = session.run(None, {{"features": features}})[0]  # float32 {shape}""",
    ".pt": """import torch
model = torch.jit.load("{file}")
embedding = model(features)  # float32 {shape}""",
    ".pt2": """import torch
model = torch.export.load("{file}").module()
embedding = model(features)  # float32 {shape}""",
}
USE_SHERPA = """import sherpa_onnx, soundfile
wave, rate = soundfile.read("A.wav", dtype="float32")  # one channel
config = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model="{file}")
extractor = sherpa_onnx.SpeakerEmbeddingExtractor(config)
stream = extractor.create_stream()
stream.accept_waveform(rate, wave)
stream.input_finished()
embedding = extractor.compute(stream)  # recordings of other rates are resampled to {rate} Hz"""


@dataclass
class Export:
    """A file that was written: its form of input, the least seconds it takes, its difference from PyTorch.

    ``measured``: lines on the int8 file beside it, if there is one.
    """

    path: Path
    kind: str
    language: str
    shortest: float
    difference: float
    measured: list[str] = field(default_factory=list)

    @property
    def card(self) -> Path:
        """Where its card is."""
        return place(self.path)


def place(out: Path) -> Path:
    """Where the card of an export is: demo.md beside demo.onnx, or demo.pt2.md where that is of another file there."""
    page = out.with_suffix(".md")
    owner = re.search(r"^\| Files \| `([^`]+)`", text_of(page), re.MULTILINE) if MARK in text_of(page) else None
    taken = owner is not None and owner.group(1) != code(out.name).strip("`") and (out.parent / owner.group(1)).exists()
    return out.with_name(f"{out.name}.md") if taken else page


def text_of(page: Path) -> str:
    """The text of a page, "" if there is none."""
    return page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""


def refuse_others(out: Path):
    """UsageError if the place of the card is taken by a file that is none."""
    page = place(out)
    if page.exists() and MARK not in text_of(page):
        raise UsageError(f"--out: its model card would replace '{page}', which is none; choose another name")


def write(model, export: Export) -> Path:
    """Write the card of an export of a model; what its owner wrote about the licence stays. Returns its path."""
    page = export.card
    first = text_of(export.path.with_suffix(".md"))  # of another file of this model, whose licence it shares
    licence = licence_in(text_of(page) or (first if model.identity in first else ""))
    run = Run(model)
    parts = [
        f"# {export.path.stem}: speaker embeddings by {model.config.model}\n\n{MARK}",
        table(("part", "what is known"), facts(model, export)),
        f"## Use\n```python\n{use(model, export)}\n```\n{comparing(run, export)}",
        f"## Figures\n{figures(run, export)}",
        f"## Training\n{training(model, run)}",
        f"## Limits\n{limits(model, run, export)}",
        f"## Licence\n{licence}",
    ]
    write_atomically(page, ("\n\n".join(parts) + "\n").encode(errors="surrogateescape"))
    return page


def licence_in(text: str) -> str:
    """What the section on the licence of a card says."""
    found = re.search(r"^## Licence\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return (found.group(1).strip() if found else "") or LICENCE


class Run:
    """What the files of a training run tell of one checkpoint of it: each part empty where nothing is known.

    ``config`` (keys that the checkpoint carries), ``epoch``; ``result`` the figures of its evaluation, the best of
    ``tried``; ``backend`` its calibration; ``hashes`` {list: SHA-256}.
    """

    tried = 0

    def __init__(self, model):
        from storage import checkpoint

        path = Path(model.path)
        state = checkpoint.load(path)
        carried = state.get("config")
        self.config = carried if isinstance(carried, dict) else {}
        self.epoch = state.get("epoch") if self.config else None
        self.backend, self.calibration = self._calibration(path.with_suffix(".calibration"), model.identity)
        result = path.parent.parent / "result"
        of_a_run = bool(self.config) and path.parent.name == "model" and result.is_dir()
        self.result = self._result(result / "metrics.jsonl", path) if of_a_run else {}
        self.hashes = self._hashes(result / "config.yaml") if of_a_run else {}

    def _calibration(self, path: Path, identity: str):
        """The calibration beside the checkpoint and the header of its file, if it is of these weights."""
        from scoring.backend import Backend

        if path.is_file():
            with contextlib.suppress(UsageError, ValueError):  # one of other scores, or of no use: then none is known
                backend = Backend.load(path)
                if backend.identity == identity:
                    return backend, json.loads(path.read_text(encoding="utf-8"))
        return None, {}

    def _result(self, path: Path, model: Path) -> dict:
        """The evaluation of this epoch whose EER is that of the file beside the checkpoint."""
        beside = model.with_suffix(".eer")
        if not (path.is_file() and beside.is_file()):
            return {}
        said, found, epochs = beside.read_text(encoding="utf-8").strip(), {}, set()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a crash cut
                event = json.loads(line)
                if event.get("event") == "eval" and event.get("eer") is not None:
                    epochs.add(event.get("epoch"))
                    same = event.get("epoch") == self.epoch and f"{event['eer']:.4f}" == said
                    found = event if same else found
        self.tried = len(epochs) if model.stem == "model_best" else 0
        return found

    def _hashes(self, path: Path) -> dict:
        """The hashes that the run noted, if the configuration beside them names the same lists as the checkpoint."""
        with contextlib.suppress(UsageError, KeyError, TypeError):  # the run was not told to write it, or by hand
            written = read_yaml(str(path))
            if all(written[name].value == self.config[name] for name in ("train_list", "test_list")):
                return dict(written["run_info"].value["sha256"])
        return {}


# ------------------------------------------------------------------------------------------------------- sections


def facts(model, export: Export) -> list[tuple[str, str]]:
    """Rows on what the file is."""
    network, config, file = model.network.__S__, model.config, export.path
    count = sum(parameter.numel() for parameter in network.parameters())
    work = flops(network, speech_like(model.sample_rate, CROP, 1).to(model.device)) / 2e9
    eight = file.with_name(f"{file.stem}_int8.onnx")
    files = f"{code(file.name)} ({NAMES[file.suffix]}, {file.stat().st_size / 1e6:.1f} MB)"
    if export.measured:
        files += f", {code(eight.name)} (weights in 8 bits, {eight.stat().st_size / 1e6:.1f} MB)"
    given = FORMS[export.kind]
    takes = f"`{given.name}`: {given.takes}, float32"
    takes += f"; one channel at {model.sample_rate:,} Hz in [-1, 1]" if export.kind == "waveform" else ""
    front = front_end(config)
    norm = f", `input_norm: {config.input_norm}`" if hasattr(config, "input_norm") else ""
    return [
        ("Files", files),
        ("Model", f"{code(f'models/{config.model}.py')}, {count:,} parameters"),
        ("Multiply-adds", f"{work:.2f} GMACs for {CROP:g} s of speech, without the Fourier transform of the features"),
        ("Input", takes),
        ("Features", f"{front}{norm}" if front else "the model's own, learned or in its file"),
        ("Output", f"`embedding` (batch, {model.dimension}) float32, not length-normalised"),
        ("Sample rate", f"{model.sample_rate:,} Hz"),
        ("Difference from PyTorch", f"at most {export.difference:.1e} in a value of the length-normalised embedding"),
        ("Identity", f"`{model.identity}`"),
    ]


def front_end(config) -> str:
    """What a model's features are: the front end with its keys, or the feature chain; '' if neither is told."""
    if not config.frontend:
        return f"`features: {config.features}`, {config.n_mels} bands" if hasattr(config, "features") else ""
    model, values = plugins.known_declaration("models", config.model), config.values()
    told = {*KEYS, *keys_of_training(values, model)}
    keys = "".join(f", `{name}: {values[name]}`" for name in keys_of_front_end(values, model) if name not in told)
    return f"`frontend: {config.frontend}`{keys}, {config.n_mels} values a frame"


def flops(network, x) -> float:
    """Floating-point operations of a forward pass in convolutions and matrix products: two a multiply-add.

    Norms, activations and the FFT of the features are not counted.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the fused attention of the CPU, but its plain form.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(x)
    return counter.get_total_flops()


def use(model, export: Export) -> str:
    """How to run the file, in Python."""
    text = (USE if export.kind == "waveform" else USE_FEATURES)[export.path.suffix]
    text = USE_SHERPA if export.kind == "sherpa-onnx" else text
    return text.format(file=export.path.name, rate=model.sample_rate, shape=FORMS[export.kind].takes.partition(" ")[2])


def comparing(run: Run, export: Export) -> str:
    """How to compare two embeddings, and from which cosine on they are of one speaker."""
    lines = ["Compare two embeddings by their cosine."]
    if export.difference > FAITHFUL:
        much = f"up to {export.difference:.2g} in a value of the length-normalised embedding"
        lines.append(
            f"**It differs from the trained model, by {much}: the figures below and thresholds are not its own.**"
        )
        return "\n".join(lines)
    if run.result and run.config.get("score_mode") == "cosine":
        eer, threshold = run.result["eer"], run.result["threshold"]
        lines.append(
            f"From **{threshold:.4f}** on they are taken to be of one speaker: of the trials below, {eer:.2f} % of "
            f"those of one speaker lie below it, and {eer:.2f} % of those of two speakers do not."
        )
        lines.append("What it gives on other recordings is unknown: choose it on trials of your own.\n")
    lines += calibrated(run)
    if len(lines) == 1:
        lines.append("A threshold is unknown: choose it on trials of your own.")
    return "\n".join(lines)


def calibrated(run: Run) -> list[str]:
    """What the calibration beside the checkpoint says of a cosine, in lines; none without one of the cosine alone."""
    found = run.backend.calibration if run.backend is not None else None
    if found is None or found.names != ("score",) or run.calibration.get("score") != "cosine":
        return []
    (weight,), bias = found.weights, found.bias
    threshold, source = run.backend.decision_threshold()
    trials = f" on {code(run.calibration['test_list'])}" if run.calibration.get("test_list") else ""
    cosine, sign = (threshold - bias) / weight, "-" if bias < 0 else "+"
    highest = run.backend.highest
    out_of_reach = highest is not None and threshold > highest
    reached = ", which no pair reaches: at this prior all are taken to be of two speakers" if out_of_reach else ""
    cautions = [f"Caution: {text.partition(': ')[2]}." for text in run.backend.cautions]
    return [
        f"Calibrated{trials}, {weight:.4f} x cosine {sign} {abs(bias):.4f} is the natural-log likelihood ratio; one "
        f"speaker from {threshold:.4f} on ({source}), a cosine of {cosine:.4f}{reached}.",
        *cautions,
    ]


def figures(run: Run, export: Export) -> str:
    """The figures of the checkpoint's own evaluation with their intervals, and what was measured in this export."""
    parts = []
    for name, result in {run.result.get("list", ""): run.result, **run.result.get("others", {})}.items():
        if result:
            parts.append(figures_of(run, result, name))
    if parts and run.tried > 1:
        parts.append(
            f"The best of {run.tried} evaluations on these trials was kept: on others expect somewhat more errors."
        )
    if not parts and "eer" in run.calibration:
        c = run.calibration
        parts.append(
            f"EER {c['eer']:.2f} % on {c['trials']:,} trials of {code(c['test_list'])} (SHA-256 "
            f"`{c['test_list_sha256']}`); its interval is unknown."
        )
    if not parts:
        parts.append("Unknown: no evaluation of these weights lies beside the checkpoint.")
    if export.measured:
        lines = "\n".join(f"- {line}" for line in export.measured)
        parts.append(f"Of the files themselves, measured when they were written:\n\n{lines}")
    return "\n\n".join(parts)


def figures_of(run: Run, result: dict, name: str) -> str:
    """A table of one trial list."""
    listed = code(name or run.config.get("test_list", ""))
    about = f"PyTorch, epoch {run.epoch}, {result['trials']:,} trials of {listed}, {result['targets']:,} of one speaker"
    if run.hashes.get("test_list") and not name:
        about += f" (SHA-256 `{run.hashes['test_list']}`)"
    crops = run.config.get("eval_frames")
    about += f"; scores are {run.config.get('score_mode', UNKNOWN)}, of "
    about += f"crops of {crops / 100:g} s." if crops else "whole recordings."
    if result.get("nan_scores"):
        about += f" {result['nan_scores']:,} further trials gave no score and are left out."
    rows = []
    for key, label, digits, unit in figure_keys(result):
        interval = UNKNOWN
        if f"{key}_low" in result:
            interval = f"{result[f'{key}_low']:.{digits}f} to {result[f'{key}_high']:.{digits}f}"
        rows.append((label, f"{result[key]:.{digits}f}{unit}", interval))
    head = ("figure", "value", f"95 % interval, over {result.get('interval', UNKNOWN)}")
    return f"{about}\n\n{table(head, rows)}"


def figure_keys(result: dict):
    """(key, label, digits, unit) of the figures that a result holds."""
    yield "eer", "EER", 2, " %"
    for name, label in (("min_dcf", "minDCF"), ("act_dcf", "actDCF, calibrated")):
        for key, value in result.items():
            if re.fullmatch(rf"{name}_[\d.]+", key) and value is not None:
                yield key, f"{label}, {100 * float(key.rpartition('_')[2]):g} % of one speaker", 4, ""
    if result.get("cllr") is not None:
        yield "cllr", "Cllr, calibrated", 4, " bit"


def training(model, run: Run) -> str:
    """What the weights were trained on and how."""
    c = run.config
    if not c:
        return "Unknown: the checkpoint carries no configuration of this trainer."
    speakers, utterances = counts(model, run)
    digest = run.hashes.get("train_list")
    listed = code(c.get("train_list", "")) + (f" (SHA-256 `{digest}`)" if digest else "; its hash is unknown")
    loss = f"`{c.get('trainfunc')}`" + "".join(f", {key} {c[key]:g}" for key in ("margin", "scale") if key in c)
    rows = [
        ("List", listed),
        ("Speakers", speakers),
        ("Recordings", utterances),
        ("Hours, languages, devices", UNKNOWN),
        ("Epochs", f"{run.epoch} of {c.get('max_epoch', UNKNOWN)}, crops of {c.get('max_frames', 0) / 100:g} s"),
        ("Loss", loss),
        ("Optimizer", f"`{c.get('optimizer')}`, `{c.get('scheduler')}`, learning rate {c.get('lr')}"),
        ("Augmentation", augmentation(c)),
        ("Began from", code(c["initial_model"]) if c.get("initial_model") else "random weights"),
        ("Seed", str(c.get("seed", UNKNOWN))),
    ]
    return table(("part", "what is known"), rows)


def counts(model, run: Run) -> tuple[str, str]:
    """Speakers and recordings in words: of the list if it is still the one that the run read."""
    from corpus.train_list import train_list_of

    with contextlib.suppress(UsageError):  # the list is not on this machine, or no longer a list
        found = train_list_of(model.config)
        if found.hash == run.hashes.get("train_list"):
            return f"{len(found.speakers):,}", f"{len(found):,}"
    classes = run.config.get("nClasses")
    return f"{classes:,} classes of the loss" if classes else UNKNOWN, UNKNOWN


def augmentation(config: dict) -> str:
    """Which keys of augmentation were on."""
    names = ("augment", "augmentation", "speed_perturb", "mixup", "spec_augment")
    said = [f"`{name}: {config[name]}`" for name in names if config.get(name) and config[name] != [0, 0]]
    return ", ".join(said) or "none"


def limits(model, run: Run, export: Export) -> str:
    """What the file does not do, and what nobody has measured."""
    least = f"{export.shortest:g} s"
    lines = [
        f"Takes recordings from {least} up. A shorter one is repeated to that length first, as `embed.py` does; what "
        "is shorter than 0.3 s says too little of a voice.",
    ]
    if export.kind == "sherpa-onnx":
        lines[0] = f"Takes recordings from {least} up; sherpa-onnx does not repeat a shorter one."
    window = model.config.embed_window_seconds
    if window:
        lines.append(
            f"Of a recording longer than {window:g} s this trainer takes the mean over windows of that length; the "
            "file takes it whole."
        )
    vad = run.config.get("vad", "none")
    if vad != "none":
        lines.append(
            f"The figures are of the speech of each recording alone, as `vad: {vad}` finds it; the file takes a "
            "recording as it is, so cut out before what is not speech."
        )
    crop = run.config.get("max_frames")
    lines.append(
        f"Trained on crops of {crop / 100:g} s; how the error rates change with the length is unknown."
        if crop
        else "The length of the recordings it was trained on is unknown."
    )
    spoken = (
        f"Language: {export.language}, as who exported it says." if export.language != UNKNOWN else "Language: unknown."
    )
    lines += [
        spoken + " Other languages, microphones, rooms, codecs and noise than those of its lists were not tried.",
        "Error rates by gender, age or accent are unknown.",
        "It tells voices apart and does not notice recordings that are played back, cloned or synthesised.",
    ]
    return "\n".join(f"- {line}" for line in lines)


# ------------------------------------------------------------------------------------------------------- Markdown


def code(text) -> str:
    """A text as code in a line or a cell."""
    clean = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{clean}`" if clean else UNKNOWN


def table(head, rows) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
