"""A trained model ready to embed: ``load_model(path).embed(wave, sample_rate)``.

from speaker_model import load_model
model = load_model("exps/demo/model/model_best.model")
embedding = model.embed(wave, 44100)                        # (D,) float32, not length-normalised
"""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from config import SAMPLE_RATE, Config
from corpus.acoustics import Acoustics
from corpus.audio import (
    CHANNELS,
    MIN_EMBED_SECONDS,
    SILENT_DB,
    AudioError,
    Excerpt,
    decibels,
    least_samples,
    note_on_files,
    read_crop,
    resample,
    wrap_pad,
)
from corpus.speech import VADS, joined, kept_spans, no_speech
from errors import UsageError, plural
from settings.command_line import existing_file, need
from storage.identity import identity_of
from training.trained import configuration_of, network_of


class SpeakerModel:
    """Embeds whole utterances. ``config``: the keys it was built with; ``dimension`` of an embedding.

    ``sample_rate`` in Hz is what it works at, and what audio of other rates is brought to.

    It computes in fp32, or as ``compute_in_bfloat16`` and ``compute_by_onnx`` choose.
    """

    def __init__(self, network, config: Config, device, path):
        self.network, self.config, self.device, self.path = network.eval(), config, device, path
        self.dimension, self.sample_rate = config.nOut, config.sample_rate
        self.identity = identity_of(network.state_dict(), config)
        self.bfloat16 = False
        self.onnx: Callable | None = None  # computes in the place of the network

    def compute_in_bfloat16(self):
        """Compute products and convolutions in bfloat16 from now on; UsageError where the device only emulates it."""
        import torch

        from training.precision import is_emulated

        if is_emulated(torch.bfloat16, self.device):
            raise UsageError("--precision: this device has no bfloat16 instructions; float32 is faster here")
        self.bfloat16 = True

    def compute_by_onnx(self, path):
        """Compute by an ONNX file of this model from now on, in onnxruntime on the CPU; UsageError if it is not."""
        from storage.exported import OnnxModel

        self.onnx = OnnxModel(path, self.identity)

    def embed(self, wave, sample_rate: int | None = None, min_seconds: float = MIN_EMBED_SECONDS) -> np.ndarray:
        """Embed a wave -> (D,) float32, not length-normalised.

        ``wave``: (samples,), or (channels, samples), which are averaged; float in [-1, 1], or int16. Its
        ``sample_rate`` is the model's if none is given, and one of another rate is resampled. ValueError for an empty,
        too short or silent wave, another type, samples or an embedding that are not finite.
        """
        rate = self.sample_rate if sample_rate is None else sample_rate
        x = self._speech(to_float(wave, rate, self.sample_rate), "the wave", min_seconds)
        return self._embed(x, "the wave")

    def embed_file(self, path, min_seconds: float = MIN_EMBED_SECONDS) -> np.ndarray:
        """Embed an audio file of any rate -> (D,) float32; UsageError if that is not possible."""
        return self._embed_file(path, min_seconds)[0]

    def hear_file(self, path, min_seconds: float = MIN_EMBED_SECONDS) -> tuple[np.ndarray, Acoustics]:
        """Embed an audio file as ``embed_file`` does, and measure how it sounds."""
        embedding, crop, x = self._embed_file(path, min_seconds)
        return embedding, self._acoustics(crop, x)

    def hear(self, crop: Excerpt, min_seconds: float = MIN_EMBED_SECONDS) -> tuple[np.ndarray, Acoustics]:
        """Embed a recording that was read at ``sample_rate``, and measure how it sounds; ValueError as ``embed``."""
        x = self._speech(crop.x, "the wave", min_seconds)
        return self._embed(x, "the wave"), self._acoustics(crop, x)

    def _acoustics(self, crop: Excerpt, x: np.ndarray) -> Acoustics:
        return Acoustics.of(crop.x, self.sample_rate, crop.rate, crop.codec, len(x) / self.sample_rate)

    def _embed_file(self, path, min_seconds: float):
        try:
            crop = read_crop(path, channel=self.config.channel, sample_rate=self.sample_rate)
        except AudioError as error:
            raise UsageError(f"{path}: {error}") from error
        try:
            x = self._speech(crop.x, str(path), min_seconds)
            embedding = self._embed(x, str(path))
        except ValueError as error:
            cancelled = "".join(f"; {text}" for kind, text in crop.notes if kind == "channels cancel")
            raise UsageError(f"{error}{cancelled}") from error
        for kind, text in crop.notes:
            print(f"{path}: {kind}: {text}", file=sys.stderr)
        return embedding, crop, x

    def _speech(self, x: np.ndarray, what: str, min_seconds: float) -> np.ndarray:
        """What is embedded of a waveform (samples,); ValueError if it says nothing of a voice."""
        fault = fault_of(x, min_seconds, self.sample_rate)
        if not fault and self.vad != "none":
            x = joined(x, kept_spans(x, self.sample_rate, self.vad))
            fault = fault_of(x, min_seconds, self.sample_rate) if len(x) else no_speech(self.vad)
        if fault:
            raise ValueError(f"{what}: {fault}")
        return x

    def _embed(self, x: np.ndarray, what: str) -> np.ndarray:
        rows, too_large = self.embed_rows(wrap_pad(x, least_samples(self.sample_rate))[None])
        if too_large:
            raise ValueError(f"{what}: {too_large[0]}")
        embedding = rows[0]
        if not np.isfinite(embedding).all():
            raise ValueError(f"{what}: its embedding is not finite ({wave_in_words(x)})")
        return embedding

    @property
    def vad(self) -> str:
        """The detector whose speech alone of a recording is embedded, or "none": the key ``vad``."""
        return self.config.vad

    @property
    def window(self) -> int:
        """Samples of the windows in which a longer recording is embedded, 0 for none."""
        from corpus.windows import window_samples

        return window_samples(self.config.embed_window_seconds, self.sample_rate)

    def embed_batch(self, x) -> np.ndarray:
        """Embed waveforms of equal length (B, samples) at ``sample_rate`` -> (B, D) float32."""
        from corpus.windows import embed_windows
        from training.precision import without_tf32

        with without_tf32():
            return embed_windows(self._forward, x, self.window).numpy()

    def embed_rows(self, x):
        """As ``embed_batch``, and {row: reason} of the rows, then NaN, for which memory is too small."""
        from corpus.windows import embed_rows
        from training.precision import without_tf32

        with without_tf32():
            rate = self.sample_rate
            rows, too_large = embed_rows(self._forward, x, self.window, self.dimension, sample_rate=rate)
        return rows.numpy(), too_large

    def _forward(self, x, network=None):
        import torch

        x = torch.as_tensor(x)
        if self.onnx is not None:
            return self.onnx(x)
        cast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
        with torch.inference_mode(), cast:
            return (network or self.network)(x.to(self.device)).float().cpu()

    def _embed_in_order(self, loader):
        """(batch, what ``embed_rows`` gives of it, None of one without files) of each batch, several at a time."""
        from corpus.loader import LoaderFailed
        from corpus.windows import Replicas, batches_at_once, embed_rows, in_order
        from training.precision import without_tf32

        replicas = Replicas(self.network, self.device) if self.onnx is None else None
        forward = functools.partial(self._forward, network=replicas)

        def embed(batch, alone):
            read, audio, _ = batch
            if not read:
                return None
            return embed_rows(forward, audio[:, 0], self.window, self.dimension, alone, self.sample_rate)

        with without_tf32():  # here, for what it sets is the same in all threads
            for batch, embedded in in_order(
                loader, embed, replicas.count if replicas else batches_at_once(self.device)
            ):
                if isinstance(batch, LoaderFailed):
                    raise batch
                yield batch, embedded

    def iter_windows(self, path, window: float, step: float, batch_size: int = 32, min_seconds=MIN_EMBED_SECONDS):
        """Embed a file window by window -> yields (times (B, 2), embeddings (B, D), {row: reason}) in its order.

        Windows of ``window`` s begin every ``step`` s, as ``sliding_windows`` says; ``times`` are their starts and ends
        in s. A window that says nothing of a voice (silent, samples that are not finite) is a row of NaN with its
        reason. What is held in memory does not grow with the file. UsageError for a file that cannot be read,
        ValueError for windows that cannot be.
        """
        from corpus.sliding import grid_fault, sliding_windows

        fault = grid_fault(window, step, min_seconds)
        if fault:
            raise ValueError(fault)
        notes: list[tuple[str, str]] = []
        waiting: list[tuple] = []
        try:
            for piece in sliding_windows(path, window, step, self.config.channel, self.sample_rate, notes):
                if waiting and (len(waiting) == batch_size or len(piece[2]) != len(waiting[0][2])):
                    yield self._embed_pieces(waiting, min_seconds)
                    waiting = []
                waiting.append(piece)
        except AudioError as error:
            raise UsageError(f"{path}: {error}") from error
        yield self._embed_pieces(waiting, min_seconds)
        for kind, text in notes:
            print(f"{path}: {kind}: {text}", file=sys.stderr)

    def _embed_pieces(self, pieces: list[tuple], min_seconds: float):
        """(times, embeddings, {row: reason}) of (start, end, wave) of equal length."""
        rate, waves = self.sample_rate, [x for _, _, x in pieces]
        reasons = {row: fault for row, x in enumerate(waves) if (fault := fault_of(x, min_seconds, rate))}
        sound = [row for row in range(len(waves)) if row not in reasons]
        embeddings = np.full((len(waves), self.dimension), np.nan, np.float32)
        if sound:
            rows, too_large = self.embed_rows(np.stack([wrap_pad(waves[row], least_samples(rate)) for row in sound]))
            embeddings[sound] = rows
            reasons |= {sound[row]: reason for row, reason in too_large.items()}
        for row in sound:
            if row not in reasons and not np.isfinite(embeddings[row]).all():
                reasons[row], embeddings[row] = f"its embedding is not finite ({wave_in_words(waves[row])})", np.nan
        return np.array([piece[:2] for piece in pieces]), embeddings, reasons

    def embed_windows(self, path, window: float, step: float, batch_size: int = 32):
        """Embed a file in windows -> (times (N, 2) in s, embeddings (N, D), {index: reason}), as ``iter_windows``."""
        from corpus.sliding import put_together

        return put_together(list(self.iter_windows(path, window, step, batch_size)))

    def embed_files(self, paths, batch_size: int = 32, progress: bool = False, workers: int = 0):
        """Embed many files, those of equal length together, without padding.

        Returns ((N, D) float32, a row of NaN if a file gave nothing, and {index: reason}). ``workers`` processes
        read the audio.
        """
        from tqdm import tqdm

        from corpus.loader import Loader
        from DatasetLoader import TestDataset, collate_one

        how = self.config.channel, self.sample_rate, self.vad
        dataset = TestDataset([str(path) for path in paths], "", 0, 1, batch_size, *how)
        problems = dict(dataset.problems)
        embeddings = np.full((len(paths), self.dimension), np.nan, np.float32)
        plan = [[i] for i in range(len(dataset))]
        loader = Loader(dataset, plan, collate_one, self.config, min(workers, len(plan)))
        bar = tqdm(total=len(paths), unit="file", leave=False, disable=not (progress and sys.stderr.isatty()))
        notes = {}
        for (read, audio, unreadable), embedded in self._embed_in_order(loader):
            problems.update(unreadable)
            for kind, file, text in unreadable.notes:
                notes.setdefault(kind, {})[file] = text
            if read:
                rows, too_large = embedded
                embeddings[read] = rows.numpy()
                problems.update({read[row]: reason for row, reason in too_large.items()})
                for index, x in zip(read, audio[:, 0].numpy()):
                    own = x[: dataset.lengths[index]]  # without the repetition of a short one
                    fault = problems.get(index) or fault_of(own, MIN_EMBED_SECONDS, self.sample_rate)
                    if not fault and not np.isfinite(embeddings[index]).all():
                        fault = f"its embedding is not finite ({wave_in_words(own)})"
                    if fault:
                        problems[index], embeddings[index] = fault, np.nan
            bar.update(len(read) + len(unreadable))
        bar.close()
        for kind, files in notes.items():
            print(note_on_files(kind, files), file=sys.stderr)
        return embeddings, problems


def fault_of(x: np.ndarray, min_seconds: float, sample_rate: int = SAMPLE_RATE) -> str:
    """Why a waveform (samples,) says nothing of a voice, or ""."""
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        return f"{plural(len(bad), 'NaN or Inf sample')}, the first at {bad[0] / sample_rate:.3f} s"
    if len(x) < min_seconds * sample_rate:
        length = f"{len(x) / sample_rate:.4g} s ({len(x)} samples at {sample_rate / 1000:g} kHz)"
        return f"too short: {length}, needs {min_seconds:g} s"
    level = decibels(x)
    if level < SILENT_DB:
        return f"silent: {level:.0f} dB of full scale, below {SILENT_DB:g}" if level > -np.inf else "silent: all zero"
    return ""


def wave_in_words(x: np.ndarray) -> str:
    """Length and range of a waveform in a few words."""
    return f"{len(x)} samples from {x.min():.4g} to {x.max():.4g}"


def to_float(wave, rate, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A wave at ``rate`` as one channel of float32 at ``sample_rate``; ValueError for what is none."""
    x = np.asarray(wave)
    if x.dtype == np.int16:
        x = x.astype(np.float32) / np.float32(32768.0)
    elif x.dtype.kind != "f":
        raise ValueError(f"a wave is float in [-1, 1] or int16, got {x.dtype}")
    if x.ndim not in (1, 2) or not x.size:
        raise ValueError(f"a wave is (samples,) or (channels, samples) and not empty, got shape {x.shape}")
    if x.ndim == 2 and x.shape[0] > x.shape[1]:
        raise ValueError(f"a wave of several channels is (channels, samples), got shape {x.shape}: transpose it")
    if int(rate) != rate or rate < 1:
        raise ValueError(f"sample_rate must be a whole number of Hz, got {rate}")
    x = x.astype(np.float32)
    if x.ndim == 2:
        x = np.ascontiguousarray(x.T).mean(axis=1)  # summed in the order in which a file's channels are
    return resample(np.ascontiguousarray(x), int(rate), sample_rate=sample_rate)


def load_model(path, config: str = "", device: str = "auto") -> SpeakerModel:
    """Load a checkpoint of ours, or with ``config`` (a YAML file) of another toolkit, to embed with.

    Toolkits publish one architecture with embeddings of several sizes: the size of another toolkit's checkpoint is
    that of its tensors, with a line on stderr if ``nOut`` says otherwise. UsageError if it does not match the
    configuration in every other tensor, or holds values that are not finite.
    """
    import torch

    from SpeakerNet import SpeakerNet
    from storage import checkpoint

    state = checkpoint.load(path)
    resolved = configuration_of(state, path, config, SpeakerNet)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: cuda is not available on this machine")
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    said = resolved.nOut
    network = network_of(state, path, resolved, SpeakerNet)
    if resolved.nOut != said:
        print(f"{path}: embeddings of {resolved.nOut} values, not of the {said} that nOut says", file=sys.stderr)
    return SpeakerModel(network.to(chosen), resolved, chosen, path)


def add_model_arguments(parser, required: bool = True, embeds: bool = True):
    """Add the flags that ``model_from`` reads; for a command that ``embeds`` also those of how it computes."""
    parser.add_argument(
        "--initial_model", required=required, default="", metavar="CKPT", help="checkpoint of a trained model"
    )
    parser.add_argument("--config", default="", metavar="YAML", help="its configuration, where the checkpoint has none")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default auto)"
    )
    parser.add_argument(
        "--embed_window_seconds",
        type=float,
        metavar="SECONDS",
        help="embed a longer recording in overlapping windows of this, whose mean counts; 0 never (default: what the "
        "configuration says, 300 if nothing)",
    )
    parser.add_argument(
        "--channel",
        choices=CHANNELS,
        help="of recordings with several channels: their mean, a channel, or the one of the most energy (default: what "
        "the configuration says, mix if nothing)",
    )
    parser.add_argument(
        "--vad",
        choices=VADS,
        help="embed the speech of a recording alone, found by energy or by silero-vad (default: what the configuration "
        "says, none if nothing)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 leaves it to torch (default)")
    if not embeds:
        return
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16"),
        help="what products and convolutions are computed in (default float32)",
    )
    parser.add_argument("--onnx", default="", metavar="FILE", help="compute by what export.py made of the model")


def model_from(args) -> SpeakerModel:
    """Load the model that the flags of ``add_model_arguments`` name."""
    existing_file(args.initial_model, "--initial_model")
    if args.config:
        existing_file(args.config, "--config")
    onnx, precision = getattr(args, "onnx", ""), getattr(args, "precision", "float32")
    if onnx:
        existing_file(onnx, "--onnx")
        if precision != "float32" or args.device == "cuda":
            raise UsageError(
                "--onnx: computes as the file says, on the CPU; leave --precision and --device as they are"
            )
    if args.threads < 0:
        raise UsageError(f"--threads: must be at least 0, got {args.threads}")
    seconds = args.embed_window_seconds
    if seconds is not None and not 0 <= seconds < math.inf:
        raise UsageError(f"--embed_window_seconds: must be at least 0, got {seconds:g}")
    import torch

    from training.allocator import keep_freed_memory

    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(Path(args.initial_model), args.config, "cpu" if onnx else args.device)
    if seconds is not None:
        model.config.embed_window_seconds = seconds
    if args.channel is not None:
        model.config.channel = args.channel
    if args.vad is not None:
        model.config.vad = args.vad
    if model.vad == "silero":
        need("vad: silero", "silero_vad")
    if onnx:
        model.compute_by_onnx(onnx)
    if precision == "bfloat16":
        model.compute_in_bfloat16()
    return model
