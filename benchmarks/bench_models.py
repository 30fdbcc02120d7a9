"""Parameters, FLOPs, published error rates and embedding speed of every model, as the table of docs/models.md.

python benchmarks/bench_models.py                            # print the tables
python benchmarks/bench_models.py --only ReDimNet ResNet34   # settings whose names hold one of these words
python benchmarks/bench_models.py --check                    # fp32, bf16 and fp16, gradients, lengths, batches
python benchmarks/bench_models.py --memory                   # what a training step keeps of an utterance
python benchmarks/bench_models.py --write docs/models.md     # put the tables between their marks in the page

The settings are those of benchmarks/published_models.py. A parameter count that differs from it is an error.
"""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UsageError
from settings.command_line import Parser, existing_file, run

SECONDS = 2
CROPS = (2.0, 6.0)  # seconds: of common recipes, and of fine-tuning with large margins
LEAST_TIME = 0.3  # seconds that a speed is measured for, at least
SLOW = 0.3  # seconds for one utterance alone: from here on batches are not measured, there is nothing to gain
# Parameters whose gradient is exactly zero, and why.
WITHOUT_GRADIENT = {
    r"backbone\.inputs_weights\.0": "the softmax of one weight is 1",
}


def build(setting):
    """The model of a setting, initialised from a fixed seed."""
    import torch

    from settings import plugins

    torch.manual_seed(0)
    return plugins.call(plugins.load("models", setting.model), setting.keys)


def count_parameters(model) -> int:
    """Trainable and constant parameters, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def voices(rows: int, seconds: float):
    """Synthetic voices (rows, samples) of different speakers at the level of speech recordings."""
    import numpy as np
    import torch

    from make_demo_data import draw_speaker, synthesize

    rng = np.random.default_rng(0)
    spoken = [synthesize(draw_speaker(rng), max(seconds, 0.5), rng) for _ in range(rows)]
    return 0.07 * torch.tensor(np.stack(spoken), dtype=torch.float32)[:, : int(seconds * 16000)]


def count_flops(model) -> float:
    """Floating-point operations of one utterance of 2 s in convolutions and matrix products.

    A multiply-add is two operations. Norms, activations and the FFT of the features are not counted.
    """
    from exporting.card import flops

    return flops(model, voices(1, SECONDS))


def utterances_per_second(model, rows: int, threads: int) -> float:
    """Embeddings of 2 s a second, waveform to embedding, in batches of ``rows``: by the median batch."""
    import torch

    torch.set_num_threads(threads)
    x = voices(rows, SECONDS)
    taken = []
    with torch.inference_mode():
        if rows == 1:
            model(x)  # the first call chooses kernels
        while sum(taken) < LEAST_TIME:
            begin = time.perf_counter()
            model(x)
            taken.append(time.perf_counter() - begin)
    return rows / statistics.median(taken)


def speed_row(setting) -> list[str]:
    """Cells of the main table."""
    model = build(setting).eval()
    speeds = []
    for threads in (1, 2):
        speeds.append(utterances_per_second(model, 1, threads))
        speeds.append(utterances_per_second(model, 16, threads) if speeds[0] > 1 / SLOW else 0)
    return [
        setting.name,
        keys_text(setting),
        counted(setting, model),
        setting.published,
        f"{count_flops(model) / 1e9:.2f}",
        setting.eer,
        ", ".join(filter(None, (setting.source, setting.condition))),
        *(f"{speed:.{0 if speed >= 10 else 1}f}" if speed else "-" for speed in speeds),
        f"{max(speeds) * SECONDS:.0f}",
    ]


def counted(setting, model) -> str:
    """The number of parameters; UsageError where it is not the setting's."""
    parameters = count_parameters(model)
    if parameters != setting.parameters:
        raise UsageError(f"{setting.name}: {parameters:,} parameters, expected {setting.parameters:,}")
    return f"{parameters:,}"


def keys_text(setting) -> str:
    """The keys of a setting as they stand in YAML."""
    keys = {"model": setting.model, **setting.keys}
    shown = {key: str(value).lower() if isinstance(value, bool) else value for key, value in keys.items()}
    return "`" + ", ".join(f"{key}: {value}" for key, value in shown.items()) + "`"


def check_row(setting) -> list[str]:
    """Cells of the table of checks; UsageError names what fails."""
    import torch

    torch.set_num_threads(1)  # more wait for one another on a machine that does other work
    model = build(setting).train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for dtype, seconds in ((torch.float16, 0.2), (torch.bfloat16, 0.5), (torch.float32, 1.5)):
        model.load_state_dict(start)
        backward(setting, model, voices(3, seconds), dtype)
    zero = [name for name, p in model.named_parameters() if not p.grad.any()]
    return [setting.name, "yes", "yes", "yes", unreached(setting, zero), lengths(setting, model.eval()), batches(model)]


def backward(setting, model, x, dtype):
    """Forward and backward pass of training under autocast to ``dtype``; UsageError where a value is not finite.

    The loss is the mean over the batch of the cosine to random directions, as large as that of a margin head.
    """
    import torch
    import torch.nn.functional as F

    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        out = model(x)
    directions = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    F.cosine_similarity(out.float(), directions).mean().backward()
    bad = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    bad += [name for name, buffer in model.named_buffers() if not buffer.isfinite().all()]
    if bad or not out.isfinite().all():
        raise UsageError(f"{setting.name}: not finite in {dtype}: {', '.join(bad[:5]) or 'the embedding'}")


def unreached(setting, zero: list[str]) -> str:
    """How many parameters have no gradient, and why; UsageError where no reason is known."""
    import re

    reasons = []
    for name in zero:
        reason = next((text for pattern, text in WITHOUT_GRADIENT.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            raise UsageError(f"{setting.name}: no gradient reaches {name}")
        reasons.append(f"all but {name.rsplit('.', 2)[-2]}.{name.rsplit('.', 1)[-1]} ({reason})")
    return "; ".join(dict.fromkeys(reasons)) or "all"


def lengths(setting, model) -> str:
    """Embed utterances of 0.5, 0.62 and 1.25 s; UsageError where one is not finite."""
    import torch

    with torch.inference_mode():
        for samples in (8000, 9999, 20000):
            if not model(voices(1, 1.25)[:, :samples]).isfinite().all():
                raise UsageError(f"{setting.name}: not finite for {samples} samples")
    return "yes"


def batches(model) -> str:
    """Largest difference between embeddings computed together and alone, relative to their largest value."""
    import torch

    x = voices(3, 0.62)
    with torch.inference_mode():
        together, alone = model(x), torch.cat([model(row[None]) for row in x])
    return f"{float((together - alone).abs().max() / together.abs().max()):.0e}"


def activation_megabytes(model, seconds: float, dtype) -> float:
    """MB that one more utterance of a batch keeps from the forward pass for the backward pass."""
    few, many = 2, 4  # rows: batch normalisation wants more than one
    # The difference, for what does not grow with the batch (weights, their copies in bfloat16) is kept once.
    return (kept_bytes(model, many, seconds, dtype)[0] - kept_bytes(model, few, seconds, dtype)[0]) / (many - few) / 1e6


def recomputed_megabytes(model, plain, seconds: float, dtype) -> float:
    """MB that one more utterance takes under `gradient_checkpointing`: what is kept, and the largest block again.

    ``plain`` is the same model, whose blocks keep their activations.
    """
    blocks = plain.blocks()
    largest = max(kept_bytes(plain, 4, seconds, dtype, blocks)[1]) - max(
        kept_bytes(plain, 2, seconds, dtype, blocks)[1]
    )
    return activation_megabytes(model, seconds, dtype) + largest / 2 / 1e6


def kept_bytes(model, rows: int, seconds: float, dtype, blocks=()) -> tuple[int, list[int]]:
    """Bytes of all tensors that a forward pass keeps, and that each of ``blocks`` does; no values are computed."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept, wave = {}, voices(rows, seconds)

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # which also keeps its address from being used again
        return tensor

    def total():
        return sum(storage.nbytes() for storage in kept.values())

    begun, of_blocks, handles = [], [], []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(lambda module, inputs: begun.append(total())))
        handles.append(block.register_forward_hook(lambda module, inputs, out: of_blocks.append(total() - begun.pop())))
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32),
    ):
        model(fake.from_tensor(wave))
    for handle in handles:
        handle.remove()
    return total(), of_blocks


def memory_row(setting) -> list[str]:
    """Cells of the table of memory."""
    import torch

    from training.recompute import recompute_blocks

    plain, model = build(setting).train(), build(setting).train()
    kinds = [(seconds, dtype) for seconds in CROPS for dtype in (torch.float32, torch.bfloat16)]
    cells = [f"{activation_megabytes(plain, *kind):.0f}" for kind in kinds]
    if not hasattr(model, "blocks"):
        return [setting.name, *cells, "-", "-"]
    recompute_blocks(model.blocks())
    return [setting.name, *cells, *(f"{recomputed_megabytes(model, plain, *kind):.0f}" for kind in kinds[2:])]


SPEED_HEAD = (
    "model | keys | parameters | authors' figure | GFLOP | EER on O / E / H (%) | of"
    " | utt/s, 1 thread | in 16s | utt/s, 2 threads | in 16s | x real time"
)
COUNT_HEAD = "model | keys | parameters | authors' figure"
MEMORY_HEAD = "model | " + " | ".join(f"{seconds:g} s, {kind}" for seconds in CROPS for kind in ("fp32", "bf16"))
MEMORY_HEAD += f" | {CROPS[1]:g} s, fp32, recomputed | {CROPS[1]:g} s, bf16, recomputed"
CHECK_HEAD = "model | fp32 | bf16 | fp16 | gradient reaches | any length | batch against single"


def table(head: str, rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, " | ".join(["---"] * (head.count("|") + 1)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def measured_on(load: str) -> str:
    """Machine, versions and load, as a line above a table."""
    import torch
    from bench_training import machine

    torch.set_num_threads(2)
    return f"Measured on {machine(torch.device('cpu'))}; load average at the start {load}."


def replace(page: Path, name: str, text: str):
    """Put ``text`` between the marks of ``name`` in a page."""
    begin, end = f"<!-- {name}: made by benchmarks/bench_models.py -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UsageError(f"{page}: has no line '{begin}' with a later '{end}'")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main(argv) -> int:
    """Run the benchmark."""
    parser = Parser("benchmarks/bench_models.py", __doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="settings whose names hold one of these words")
    parser.add_argument("--check", action="store_true", help="check the numerics instead of measuring the speed")
    parser.add_argument("--memory", action="store_true", help="count what a training step keeps, not the speed")
    parser.add_argument("--write", metavar="PAGE", help="write the tables into this page, not to the screen")
    args = parser.parse_args(argv)
    if args.write:
        existing_file(args.write, "--write")
        if args.only:
            raise UsageError("--only: leaves rows out of the page; give it without --write")
    load = f"{os.getloadavg()[0]:.1f}"
    from published_models import SETTINGS, SOURCES
    from tqdm import tqdm

    chosen = [s for s in SETTINGS if not args.only or any(word in s.name for word in args.only)]
    if not chosen:
        raise UsageError(f"--only: no setting holds {' or '.join(args.only)} in its name")
    timed, rest = [s for s in chosen if s.source], [s for s in chosen if not s.source]
    parts = {}
    if args.check:
        parts["checks"] = table(CHECK_HEAD, [check_row(s) for s in tqdm(timed, disable=None)])
    elif args.memory:
        parts["memory"] = table(MEMORY_HEAD, [memory_row(s) for s in tqdm(timed, disable=None)])
    else:
        speeds = table(SPEED_HEAD, [speed_row(s) for s in tqdm(timed, disable=None)])
        sources = "\n".join(f"- {name}: <{SOURCES[name]}>" for name in dict.fromkeys(s.source for s in timed))
        parts["models"] = f"{measured_on(load)}\n\n{speeds}\n\nWhose settings and error rates:\n{sources}"
        counts = [[s.name, keys_text(s), counted(s, build(s)), s.published] for s in rest]
        parts["further settings"] = table(COUNT_HEAD, counts)
    for name, text in parts.items():
        if args.write:
            replace(Path(args.write), name, text)
        else:
            print(f"{name}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
