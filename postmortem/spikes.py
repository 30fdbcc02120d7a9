"""Why a step was finite but far out: one row, a wrong label, the learning rate, or a weight that has grown."""

import math
from statistics import median

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from errors import plural
from postmortem.finding import Finding
from postmortem.fixes import excluded, recommendation
from postmortem.replay import OutOfTime
from storage.dump import rows_of
from storage.dump_statistics import number, odd_rows
from training.generators import restore_generators
from training.ranks import SingleProcess
from training.spikes import LEAST_RATIO
from training.step import Step

LOSSES_OF_LOGITS = ("cross_entropy", "nll_loss")
MOST_LABELS = 8  # other labels that are tried where a loss shows no logits
FEW = 8  # rows that are tried one by one
CARRIES = 0.5  # share of a row in the sum of the losses of all rows, where the run alone tells them
ODD_LEVEL = 20.0  # dB between a row and the others
ODD_CROSSINGS = 4.0  # ratio of the zero crossings of a row to those of the others
FLAT = 0.6  # flatness of a spectrum from which on it is one of noise; speech has 0.02
GROWN = 3.0  # times the growth of the other weights
NEW_WEIGHT = 3.0  # largest element of a weight that was 0 at first
SUSPECTS = 3  # weights that are tried
CHUNK, CHUNKS = 10, 6  # steps of the history whose medians are compared
RISEN = 1.5  # the last of these medians to the lowest
UPDATES = 5  # with which a learning rate is tried
JUMPED = 5.0  # the newest learning rate to those before


class LogitRecorder(TorchFunctionMode):
    """Keeps what a loss over classes compares: ``logits`` (rows, classes) and ``label`` (rows,), None without one."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.found = rows, []

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if getattr(function, "__name__", "") in LOSSES_OF_LOGITS and len(args) > 1:
            logits, label = args[:2]
            if logits.ndim == 2 and label.ndim == 1 and not label.is_floating_point():
                self.found.append((logits.detach().float().cpu(), label.detach().cpu()))
        return function(*args, **(kwargs or {}))

    def read(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Logits and labels of the whole batch, as the step had them."""
        logits: list[torch.Tensor] = []
        label: list[torch.Tensor] = []
        for one, other in self.found:  # a window of several batches has a call for each
            if sum(len(part) for part in label) < self.rows:
                logits.append(one)
                label.append(other)
        if sum(len(part) for part in label) != self.rows:
            return None, None
        return torch.cat(logits), torch.cat(label)


def spike(case) -> Finding | None:
    """Check a step that was trained on and stood far above those before it; None of any other dump."""
    if case.dump.get("reason") != "spike":
        return None
    finding = None
    for test in (guilty_rows, grown_weight, learning_rate):
        try:
            finding = test(case)
        except OutOfTime as error:
            case.evidence.append(f"{test.__name__.replace('_', ' ')}: {error}")
        if finding is not None:
            break
    if finding is None:
        text = "The step was far out; no single row, no single weight and no rise of loss or learning rate explains it."
        if case.replay is None:
            text = "The step was far out. Without its weights no row and no weight can be tried."
        finding = Finding("unknown", "spike", text)
    figures = [f"{name} {case.dump['spike'][key]:.4g}, median {m:.4g}" for key, name, m in medians(case)]
    finding.evidence.insert(0, f"against the steps before it: {'; '.join(figures)}; the step was trained on")
    return finding


def medians(case) -> list[tuple[str, str, float]]:
    """(key, name, median of the steps before) of each figure that stood out."""
    names = {"loss": "loss", "grad_norm": "gradient norm"}
    recorded = case.dump.get("spike", {})
    return [(k, name, recorded[f"{k}_median"]) for k, name in names.items() if f"{k}_median" in recorded]


def ordinary(case, outcome) -> bool:
    """Whether a replayed step lies nearer to the median than to the step as it was, by the logarithms of its figures.

    It need not be as close to the median as most steps are: a batch without a row has other statistics in BN.
    """
    if not outcome.finite:
        return False
    values, recorded = {"loss": outcome.loss, "grad_norm": outcome.norm}, case.dump["spike"]
    figures = medians(case)
    if any(values[key] <= 0 for key, *_ in figures):
        return True
    left = sum(math.log(values[key] / m) for key, _, m in figures)
    return left < sum(math.log(recorded[key] / m) for key, _, m in figures) / 2


# ------------------------------------------------------------------------------------------------ rows and labels


def guilty_rows(case) -> Finding | None:
    """Check whether the step is ordinary without one row, or without a few, and tell bad labels from bad audio."""
    if case.replay is None:
        return recorded_row(case)
    recorder = LogitRecorder(case.replay.columns)
    case.replay.run(modes=[recorder])
    logits, label = recorder.read()
    losses = None if logits is None else F.cross_entropy(logits, label, reduction="none")
    columns = carrying(case, losses)
    if not columns:
        return None
    finding = of_rows(case, columns)
    left = [c for c in range(case.replay.columns) if c not in columns]
    finding.evidence.append(f"without row {', '.join(map(str, columns))}: {case.replay.run(columns=left)}")
    if losses is not None:
        own, rest = float(losses[columns].max()), float(losses[left].mean())
        finding.evidence.append(f"loss of row {columns[0]} alone {own:.4g}, mean of the others {rest:.4g}")
    odd = oddities(case, finding.rows)
    if odd:
        finding.evidence += odd
        finding.summary = f"{named(case, finding)} carries the step, and its audio stands out ({odd[0]})."
        return finding
    return bad_label(case, finding, logits) or finding


def of_rows(case, columns: list[int]) -> Finding:
    """The finding that these labelled rows carry the step."""
    rows = case.to_rows(columns)
    finding = Finding("input", "outlier_row", "", phase="data", columns=columns, rows=rows)
    paths = list(dict.fromkeys(case.files[row]["path"] for row in rows if row < len(case.files)))
    finding.files = [{"path": path, "sample": None} for path in paths]
    mixed = [
        d["path"] for row in rows if row < len(case.files) for d in case.files[row].get("augment", []) if "path" in d
    ]
    finding.evidence += [f"augmented with {', '.join(mixed)}"] if mixed else []
    finding.summary = f"{named(case, finding)} carries the step: without it the step is ordinary."
    return finding


def named(case, finding) -> str:
    """The rows of a finding, the first with its file and list line."""
    row = finding.rows[0]
    info = case.files[row] if row < len(case.files) else None
    place = f" ({info['path']}, list line {info['line']})" if info else ""
    more = f" with {plural(len(finding.rows) - 1, 'other row')}" if len(finding.rows) > 1 else ""
    return f"Row {row}{place}{more}"


def carrying(case, losses) -> list[int]:
    """The labelled rows without which the step is ordinary, one if one is enough, a quarter at most; [] if none are."""
    everything = list(range(case.replay.columns))
    most = len(everything) // 4 or 1
    if len(everything) < 3:
        return []
    if losses is None:
        candidates = [halved(case, everything)]
    else:
        order = losses.argsort(descending=True).tolist()
        high = [c for c in order[:most] if losses[c] > GROWN * losses.median()]
        candidates = [order[:1]] + ([high] if len(high) > 1 else [])
    for columns in candidates:
        if ordinary(case, case.replay.run(columns=[c for c in everything if c not in columns])):
            return sorted(columns)
    return []


def halved(case, columns: list[int]) -> list[int]:
    """The row without which the step stands out least: the better half is followed until a few rows are left."""
    everything, figure = list(range(case.replay.columns)), medians(case)[0][0]

    def without(some: list[int]) -> float:
        outcome = case.replay.run(columns=[c for c in everything if c not in some])
        return outcome.loss if figure == "loss" else outcome.norm

    while len(columns) > FEW:  # of few rows the halves would change too much of what a batch normalisation sees
        halves = columns[: len(columns) // 2], columns[len(columns) // 2 :]
        columns = min(halves, key=without)
    return [min(columns, key=lambda column: without([column]))]


def recorded_row(case) -> Finding | None:
    """The row that carries the loss by what the run noted, where the step cannot be replayed."""
    rows = sorted(case.dump["spike"].get("rows", []), key=lambda row: -row["loss"])
    total = sum(row["loss"] for row in rows)
    if len(rows) < 3 or not math.isfinite(total) or rows[0]["loss"] < CARRIES * total:
        return None
    finding = of_rows(case, [rows[0]["row"]])
    share = 100 * rows[0]["loss"] / total
    finding.evidence.append(f"row {rows[0]['row']} has {share:.0f} % of the losses of all rows, as the run noted them")
    odd = oddities(case, finding.rows)
    finding.evidence += odd
    why = f"its audio stands out ({odd[0]})" if odd else "its label or its audio is wrong: listen to it"
    finding.summary = f"{named(case, finding)} carries the step; {why}. It was not replayed."
    return finding


def oddities(case, rows: list[int]) -> list[str]:
    """What tells the audio of a row from that of the others: level, zero crossings, clipping, silence, spectrum."""
    flat = rows_of(case.dump["data"], len(case.label())).float()
    if not flat.numel() or len(flat) < 3:
        return []
    others = [row for row in range(len(flat)) if row not in rows]
    levels = flat.square().mean(dim=1).sqrt().clamp(min=1e-12)
    crossings = (flat[:, 1:].sign() != flat[:, :-1].sign()).float().mean(dim=1).clamp(min=1e-6)
    flat_spectrum, found = flatness(flat), []
    for row in rows:
        text = odd_rows(flat[row : row + 1]).get(0)
        found += [f"row {row} is {text}"] if text else []
        decibels = 20 * math.log10(float(levels[row] / levels[others].median()))
        if abs(decibels) > ODD_LEVEL:
            found.append(
                f"row {row} is {abs(decibels):.0f} dB {'louder' if decibels > 0 else 'softer'} than the others"
            )
        ratio = float(crossings[row] / crossings[others].median())
        if not 1 / ODD_CROSSINGS < ratio < ODD_CROSSINGS:
            found.append(f"row {row} crosses zero {ratio:.2g} times as often as the others: noise, or a hum")
        if flat_spectrum[row] > FLAT > 2 * flat_spectrum[others].median():
            found.append(f"row {row} has as much power at all frequencies as white noise, the others have not")
    return found


def flatness(waveforms) -> torch.Tensor:
    """Geometric over arithmetic mean of the power spectrum of each waveform (N, samples): (N,), 1 is white noise."""
    size = min(512, waveforms.shape[1])
    frames = waveforms.unfold(1, size, size // 2 or 1) * torch.hann_window(size)
    power = torch.fft.rfft(frames).abs().square().mean(dim=1).clamp(min=1e-20)  # (N, bins)
    return power.log().mean(dim=1).exp() / power.mean(dim=1)


def bad_label(case, finding, logits) -> Finding | None:
    """Tell a wrong label: the row's own class is its least likely one, or with another label the step is ordinary."""
    label = case.label()
    least, other = [], label.clone()
    for column in finding.columns:
        if logits is not None:
            other[column] = int(logits[column].argmax())
            least.append(int(logits[column].argmin()) == int(label[column]) and logits.shape[1] > 2)
    if logits is None:
        tried = relabelled(case, finding.columns)
        cured = tried is not None
        other = tried if cured else other
    else:
        cured = ordinary(case, case.replay.run(label=other))
    if not cured and not (least and all(least)):
        return None
    first = finding.columns[0]
    own, better = int(label[first]), int(other[first])
    finding.cause, finding.detail = "label", "unlikely"
    if least and all(least):
        finding.evidence.append(f"class {own} is the least likely of {logits.shape[1]} for row {first}")
    if cured:
        finding.evidence.append(f"with label {better} instead of {own}: {case.replay.run(label=other)}")
    what = f"with label {better} the step is ordinary" if cured else "its own class is its least likely one"
    finding.summary = (
        f"{named(case, finding)} has label {own}, and {what}. Its audio is like that of the others: the label is"
        " probably wrong."
    )
    return finding


def relabelled(case, columns: list[int]):
    """Labels with which the step is ordinary: those of other rows are tried, then others; None if there are none."""
    label = case.label()
    classes = [*label.unique().tolist(), *range(min(case.classes or 0, MOST_LABELS))]
    for value in [v for v in dict.fromkeys(classes) if v not in label[columns].tolist()][:MOST_LABELS]:
        other = label.clone()
        other[columns] = value
        if ordinary(case, case.replay.run(label=other)):
            return other
    return None


# ------------------------------------------------------------------------------------------------ weights and rate


def grown_weight(case) -> Finding | None:
    """Check for a weight that grew far more than the others, and whether the step is ordinary with it scaled back."""
    if case.replay is None or case.retraining is None:
        return None
    start, ratios, factors = case.retraining.start, growth_of_weights(case), {}
    usual = max(1.0, median([r for r in ratios.values() if math.isfinite(r)] or [1.0]))
    for name, ratio in sorted(ratios.items(), key=lambda item: -item[1])[:SUSPECTS]:
        if ratio < GROWN * usual:
            break
        factors[name] = usual / ratio
        outcome = case.replay.run(edit=scaled(name, factors[name]))
        if not ordinary(case, outcome):
            continue
        text = f"'{name}' has grown to {ratio:.3g} times its norm in {start} (the other weights: {usual:.3g} times)."
        if not math.isfinite(ratio):
            text = f"'{name}' was 0 in {start} and is far from 0 now."
        text += " Scaled back, the step is ordinary."
        evidence = [f"with '{name}' scaled by {factors[name]:.3g}: {outcome}"]
        return Finding("state", "weight_growth", text, evidence, phase="state", parameter=name)
    return None


def growth_of_weights(case) -> dict[str, float]:
    """Norm of each weight to that which it began with; Inf of one that was 0 and no longer is near it."""
    start = dict(case.retraining.initial_network().named_parameters())
    found = {}
    for name, before in start.items():
        now = case.state["model_state_dict"][name].float()
        norm = float(before.detach().float().norm())
        if norm > 0:
            found[name] = float(now.norm()) / norm
        elif float(now.abs().max()) > NEW_WEIGHT:
            found[name] = math.inf
    return found


def scaled(name: str, factor: float):
    """Return an edit of a network that multiplies a weight."""

    def edit(network):
        with torch.no_grad():
            network.state_dict()[name].mul_(factor)

    return edit


def learning_rate(case) -> Finding | None:
    """Check the history: the rate is far above that before, or the loss has risen over many steps."""
    jump, rise = jumped(case), risen(case)
    if jump is None and rise is None:
        return None
    source = case.source_of("optimizer")
    evidence, now = [], case.dump["lr"]
    if jump is not None:
        source = case.source_of("scheduler")
        evidence.append(f"learning rate {jump[1]:g} within the last {2 * CHUNK} steps, median before {jump[0]:g}")
        text = f"The learning rate rose from {jump[0]:g} to {jump[1]:g} shortly before this step."
        now = jump[1]
    if rise is not None:
        evidence.append(f"median loss of {CHUNK} steps: {', '.join(f'{m:.4g}' for m in rise)}")
        rose = f"The loss has risen over {CHUNK * (len(rise) - rise.index(min(rise)))} steps"
        text = text if jump is not None else f"{rose}: the learning rate ({now:g}) is too high."
    if case.replay is not None:
        evidence.append("no single row and no single weight makes the step far out")
        text += " No row is at fault."
    return Finding("optimizer", "lr", text, evidence, phase="update", source=source, parameter="lr", setting="lr")


def jumped(case) -> tuple[float, float] | None:
    """(the usual learning rate, the newest) if it is far above that before; None if not."""
    rates = [number(h, "lr", math.nan) for h in case.dump["history"]]
    older, recent = rates[: -2 * CHUNK], [*rates[-2 * CHUNK :], case.dump["lr"]]
    older, recent = ([r for r in part if math.isfinite(r) and r > 0] for part in (older, recent))
    if len(older) < CHUNK or not recent or max(recent) < JUMPED * median(older):
        return None
    return median(older), max(recent)


def risen(case) -> list[float] | None:
    """Medians of the loss over the steps before this one, if the last of them rise; None if not."""
    losses = [number(h, "loss", math.nan) for h in case.dump["history"]][-CHUNK * CHUNKS :]
    chunks = [losses[i : i + CHUNK] for i in range(len(losses) % CHUNK, len(losses), CHUNK)]
    values = [median(chunk) for chunk in chunks]
    rises = len(values) > 2 and values[-3] < values[-2] < values[-1]
    return values if rises and min(values) > 0 and values[-1] > RISEN * min(values) else None


# ------------------------------------------------------------------------------------------------ fixes


def spike_fixes(case, finding) -> list[dict]:
    """What to do about a step that was far out: each is tried on the dump where its weights are there."""
    if finding.rows:
        try:
            return [without_row(case, finding)]
        except OutOfTime as error:
            case.evidence.append(f"fixes: {error}")
            return []
    if finding.detail == "weight_growth":
        text = f"go back to a checkpoint from before '{finding.parameter}' grew, and bound it in its module"
        outcome = finding.evidence[-1]
        return [recommendation(text, "restore", {"tensor": finding.parameter}, True, outcome)]
    return lower_rates(case) if finding.detail == "lr" else []


def without_row(case, finding) -> dict:
    """Try the step without the rows at fault."""
    paths = [f["path"] for f in finding.files] or [f"row {finding.rows[0]}"]
    verb = "correct the speaker of" if finding.cause == "label" else "listen to"
    text = "; ".join(f"{verb} {path}, or {excluded(case, path)}" for path in paths)
    change = {"file": paths[0]} if len(paths) == 1 else {"files": paths}
    if case.replay is None:
        return recommendation(text, "exclude_file", change, None, case.refusal)
    outcome = case.replay.run(columns=[c for c in range(case.replay.columns) if c not in finding.columns])
    return recommendation(text, "exclude_file", change, ordinary(case, outcome), f"without it: {outcome}")


def lower_rates(case) -> list[dict]:
    """Try lower learning rates by updates from the dump's weights: verified if the loss falls that rises as it was."""
    jump, configured = jumped(case), number(case.config, "lr")
    now = jump[1] if jump is not None else case.dump["lr"]
    fixes = []
    for factor in ([jump[0] / now] if jump is not None else []) + [0.1]:
        value = float(f"{configured * factor:.3g}")
        text = f"set lr to {value:g} (now {configured:g}; the schedule had made it {now:g})"
        fix = recommendation(text, "set", {"lr": value}, None, case.refusal)
        if case.replay is not None:
            try:
                as_it_was, lower = losses_after_updates(case, now), losses_after_updates(case, now * factor)
            except OutOfTime as error:
                fix["outcome"] = str(error)
            else:
                rises, falls = not max(as_it_was) <= LEAST_RATIO * as_it_was[0], lower[-1] < max(lower) == lower[0]
                fix["verdict"] = "verified" if rises and falls else "untested"
                fix["outcome"] = (
                    f"{UPDATES} updates from the weights of this step, without moments: loss {lower[0]:.4g} falls to"
                    f" {lower[-1]:.4g}; at {now:g} it rises to {max(as_it_was):.4g}"
                    if rises and falls
                    else f"{UPDATES} updates from the weights of this step tell nothing: the loss goes from"
                    f" {lower[0]:.4g} to {lower[-1]:.4g}, at {now:g} to {as_it_was[-1]:.4g}"
                )
        fixes.append(fix)
    return fixes


def losses_after_updates(case, lr: float) -> list[float]:
    """The loss of the batch before and after each of some updates at a learning rate; Inf ends it."""
    replay, losses = case.replay, []
    network = replay.network()
    optimizer = replay.new_optimizer(network)
    for group in optimizer.param_groups:
        group["lr"] = lr
    clip = number(case.config, "grad_clip")
    step = Step(network, SingleProcess(replay.device), optimizer=optimizer, grad_clip=clip)
    window = replay.window(replay.data, replay.label, None)
    restore_generators(case.dump["rng_state"], replay.device)
    for _ in range(UPDATES + 1):
        if case.time_left() < 0:
            raise OutOfTime("not tried: no time left (--seconds)")
        step.begin(case.dump.get("moment"))
        attempt = step.attempt(window)
        losses.append(attempt.loss)
        if not attempt.finite:
            return [*losses, math.inf]
        step.apply(attempt.norm)
    return losses
