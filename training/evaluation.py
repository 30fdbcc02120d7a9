"""Embed the files of a trial list, score the trials, and compute their figures."""

import copy
import functools
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from corpus.audio import AudioError, least_samples, note_on_files, read_crop, wrap_pad
from corpus.loader import Loader, LoaderFailed
from corpus.windows import Replicas, embed_rows, in_order, window_samples
from DatasetLoader import TestDataset, collate_one
from errors import UsageError, plural, rank_prefix
from scoring import plots
from scoring.calibration import calibrated_llrs, folds_over
from scoring.cautions import wrong_way_round
from scoring.cosine import reduce_crops, score_reduced
from scoring.error_rates import worst_eer
from scoring.figures import evaluation_metrics
from scoring.files import write_scores
from scoring.intervals import enough_speakers
from training.calibration import Calibrator
from training.precision import without_tf32
from training.subset import stratified_subset
from training.trials import Trials, numbered, read_all
from training.writes import Writes

__all__ = ["Evaluator", "describe", "stratified_subset", "write_evaluation"]

ARRAYS = ("scores", "llrs", "whole_scores")  # of a result, for the main process alone
MOST_NAMED = 1000  # files of non-finite embeddings that the event of an evaluation names


class Evaluator:
    """A trial list ready to be scored with any state of the network.

    ``trained_on``: names of the speakers of training, without whose trials a calibration is learnt where it can be.
    """

    def __init__(self, config: Config, ranks, trained_on=()):
        self.config, self.ranks, self.trained_on = config, ranks, trained_on
        self.window = window_samples(config.embed_window_seconds, config.sample_rate)
        self.notes, self.noted = {}, set()  # kind -> {test file: text} of files used all the same; kinds said before
        self.spans: dict[int, str] = {}  # file number -> range of its embeddings, if they are not finite
        lists = read_all(config)
        self.files, pairs = numbered(lists)
        self.root = lists[0].source.root
        self.dataset, self.loader = self._reading(config.eval_frames)
        self.whole = None  # dataset and loader of whole files, where crops are evaluated and a calibration is wanted
        if not len(self.dataset):
            reason = next(iter(self.dataset.problems.values()))
            paths = ", ".join(trials.source.path for trials in lists)
            raise UsageError(f"{paths}: none of the {len(self.files)} test files can be read: {reason}")
        self.others: list[Evaluator] = []
        self.others = [copy.copy(self).of(*pair) for pair in zip(lists[1:], pairs[1:])]  # they share all but the trials
        self.of(lists[0], pairs[0])
        self.mark = ""

    def _reading(self, frames: int):
        """The dataset of all files, in crops of ``frames`` or whole, and the loader of this process's part of it."""
        c = self.config
        how = frames, c.num_eval, c.eval_batch_size, c.channel, c.sample_rate, c.vad
        dataset = TestDataset(self.files, self.root, *how)
        # The plan of batches is the same under any number of processes; each takes every world-th batch.
        mine = [[i] for i in range(self.ranks.rank, len(dataset), self.ranks.world)]
        return dataset, Loader(dataset, mine, collate_one, c, min(c.nDataLoaderThread, max(len(mine), 1)))

    def of(self, trials: Trials, pairs) -> "Evaluator":
        """Take over the trials of a list; ``pairs`` (N, 2) are file numbers."""
        self.mark = f"_{trials.source.name}"  # of the files of its trials
        self.source, self.labels, self.first, self.second = trials.source, trials.labels, trials.first, trials.second
        self.speakers, self.no_speakers, self.pairs = trials.speakers, trials.no_speakers, pairs
        return self

    def embed(self, network, should_stop=lambda: False, whole: bool = False):
        """Embed every file in fp32, and keep what the score needs of it (``reduce_crops``), on the CPU.

        ``whole``: not its crops of ``eval_frames`` but all of it.

        Returns (embeddings, {file number: reason}), with rows of NaN if a file gave nothing, or None if ``should_stop``
        said so; LoaderFailed without batches.
        """
        network.eval()
        self.spans.clear()
        replicas = Replicas(network, self.ranks.device)
        embed = functools.partial(self._embed_batch, replicas)
        if whole and self.whole is None:
            self.whole = self._reading(0)
        dataset, loader = self.whole if whole else (self.dataset, self.loader)
        embeddings, problems = None, dict(dataset.problems)
        hidden = not self.ranks.main or None
        progress = tqdm(loader, desc="evaluating", leave=False, disable=hidden, unit="batch", dynamic_ncols=True)
        notes, spans, failure = {}, {}, None
        with without_tf32():  # here, for what it sets is the same in all threads
            for batch, embedded in in_order(progress, embed, replicas.count):
                if isinstance(batch, LoaderFailed):
                    failure = f"{rank_prefix()}loader: {batch}"
                if failure or should_stop():
                    break
                read, _, unreadable = batch
                problems.update(unreadable)
                for kind, file, text in unreadable.notes:
                    notes.setdefault(kind, {})[file] = text
                if embedded is None:
                    continue
                out, too_large = embedded
                problems.update({read[row // out.shape[1]]: reason for row, reason in too_large.items()})
                reduced = torch.from_numpy(reduce_crops(out, self.config.score_mode))
                if embeddings is None:
                    embeddings = torch.zeros(len(self.files), *reduced.shape[1:], dtype=reduced.dtype)
                embeddings[read] = reduced
                for index, row, own in zip(read, reduced, out):
                    if not row.isfinite().all():
                        spans[index] = tensor_in_words(own)
        failures = [text for text in self.ranks.gather(failure) if text]
        if failures:
            raise LoaderFailed(failures[0])
        if self.ranks.any(should_stop()):
            return None
        embeddings = self._merge(embeddings)
        for found, said, of_files in self.ranks.gather((problems, notes, spans)):
            problems.update(found)
            self.spans.update(of_files)
            for kind, files in said.items():
                self.notes.setdefault(kind, {}).update(files)
        embeddings[sorted(problems)] = float("nan")
        return embeddings, problems

    def _embed_batch(self, network, batch, alone: bool):
        """((files, crops, D), {row: reason}) of a batch, None of one without files."""
        read, audio, _ = batch
        if not read:
            return None

        def forward(x):
            return network(x.to(self.ranks.device)).float().cpu()

        files, crops, samples = audio.shape
        # Not around the collectives of ``embed``, which torch 2.4 refuses in inference mode.
        with torch.inference_mode():
            rows = audio.reshape(files * crops, samples)
            rate = self.config.sample_rate
            out, too_large = embed_rows(forward, rows, self.window, self.config.nOut, alone, rate)
        return out.reshape(files, crops, -1), too_large

    def _merge(self, embeddings):
        """Put the ranks' parts together: each file was embedded by one rank, the others hold zeros."""
        kind = None if embeddings is None else (embeddings.shape, embeddings.dtype)
        kinds = [kind for kind in self.ranks.gather(kind) if kind]
        if not kinds:
            return torch.full((len(self.files), 1), float("nan"))
        if embeddings is None:
            embeddings = torch.zeros(kinds[0][0], dtype=kinds[0][1])
        return self.ranks.sum(embeddings.to(self.ranks.device)).cpu()

    def run(self, network, epoch: int, should_stop=lambda: False, best: float | None = 0.0) -> dict:
        """Evaluate on all ranks; every rank returns the same result (without scores on ranks other than the main one).

        The result holds the figures of ``evaluation_metrics`` and ``epoch``, ``nan_scores``, ``nan_files``, ``failed``
        (a reason, or None) and on the main rank ``scores`` (N,) float64. Of several trial lists it is the result of the
        one that decides, with its name, ``list``, and ``others`` {name: result}. ``best``: the EER in % to be beaten,
        None is any; if it is and crops are evaluated, whole files are too, to calibrate by: ``whole_scores`` (N,).
        """
        self.ranks.share_buffers(network)
        embedded = self.embed(network, should_stop)
        if embedded is None:
            return {"epoch": epoch, "stopped": True}
        embeddings, problems = embedded
        result, normalize = None, getattr(network.loss, "test_normalize", True)
        if self.ranks.main:

            def result_of(one):
                scores = score_reduced(embeddings, one.pairs, normalize)
                return one.summarise(network, scores, embeddings, problems, epoch)

            result = result_of(self)
            if self.others:
                others = {one.source.name: result_of(one) for one in self.others}
                result.update(list=self.source.name, others=others)
        shared = self.ranks.from_main(without_scores(result) if result else None)
        if not (self.config.eval_frames and self.config.score_mode == "cosine") or shared["failed"]:
            return result or shared
        if best is None or shared["eer"] < best:
            embedded = self.embed(network, should_stop, whole=True)
            if embedded is None:
                return {"epoch": epoch, "stopped": True}
            if result:
                result["whole_scores"] = score_reduced(embedded[0], self.pairs, normalize)
        return result or shared

    def summarise(self, network, scores, embeddings, problems: dict, epoch: int) -> dict:
        """Turn scores (N,) into a result; non-finite ones are counted, traced to files, and bound the EER."""
        finite = np.isfinite(scores)
        lost = int((~finite).sum())
        bad_files = np.flatnonzero(~torch.isfinite(embeddings).flatten(1).all(dim=1).numpy())
        bad_files = np.intersect1d(bad_files, self.pairs)
        spoiled = np.bincount(self.pairs[~finite].ravel(), minlength=len(self.files))
        result = {"epoch": epoch, "nan_scores": lost, "scores": scores, "failed": None}
        new = {kind: files for kind, files in self.notes.items() if kind not in self.noted}
        result["notes"] = [note_on_files(kind, files, "test file") for kind, files in new.items()]
        self.noted |= new.keys()
        result["nan_files"] = [
            {"path": self.files[i], "trials": int(spoiled[i]), "reason": problems.get(i, "non-finite embedding")}
            for i in bad_files
        ]
        for file in result["nan_files"][:10]:
            file["statistics"] = self.statistics(network, self.files.index(file["path"]))
        lost_pairs = np.flatnonzero(~finite)[:10]
        result["nan_pairs"] = [f"{self.labels[i]} {self.first[i]} {self.second[i]}" for i in lost_pairs]
        result["nan_targets"] = int(self.labels[~finite].sum())
        left = np.unique(self.labels[finite])
        if len(left) < 2:
            result["failed"] = "all scores are non-finite" if not len(left) else "one class of trials is left"
        else:
            result.update(self.figures(scores, finite))
        return result

    def figures(self, scores, finite) -> dict:
        """Figures of the finite scores; if too many are not, numbers are None and ``failed`` says so."""
        c, lost = self.config, int((~finite).sum())
        speakers = enough_speakers(None if self.speakers is None else self.speakers[finite])
        costs, labels = (c.dcf_p_target, c.dcf_c_miss, c.dcf_c_fa), self.labels[finite]
        llrs = calibrated_llrs(scores[finite], labels, speakers, c.dcf_p_target)
        found = evaluation_metrics(scores[finite], labels, *costs, speakers, llrs)
        found.update(llrs=llrs, folds=folds_over(labels, speakers))
        if found["interval"] == "trials":
            found["no_speakers"] = self.no_speakers or "too few speakers are left"
        if lost:
            found["eer_worst"] = worst_eer(scores, self.labels)
        share = 100 * lost / len(scores)
        if share > c.max_nan_score_pct:
            found = {key: None if isinstance(value, float) else value for key, value in found.items()}
            limit = f"max_nan_score_pct {c.max_nan_score_pct:g}"
            found["failed"] = f"{share:.1f} % of the scores are non-finite ({limit})"
        return found

    @torch.no_grad()
    def statistics(self, network, number: int) -> str:
        """Describe the waveform, features and embeddings of a file that gave no finite embedding, in one line."""
        parts = []
        try:
            rate = self.config.sample_rate
            x = read_crop(Path(self.root, self.files[number]), channel=self.config.channel, sample_rate=rate).x
            parts.append("waveform " + tensor_in_words(torch.from_numpy(x)))
            frontend = getattr(network.__S__, "frontend", None)
            if frontend is not None:
                x = wrap_pad(x, least_samples(rate))[: self.window or None]
                audio = torch.from_numpy(x)[None].to(self.ranks.device)
                parts.append("features " + tensor_in_words(frontend(audio)))
        except AudioError as error:
            parts.append(f"waveform unreadable ({error})")
        return "; ".join([*parts, *([f"embedding {self.spans[number]}"] if number in self.spans else [])])

    def write_trials(self, folder, result, writes=None):
        """Write trials_epoch_N.txt and, if scores are non-finite, nan_trials_epoch_N.txt; then remove older ones.

        Those of a list E that does not decide are trials_E_epoch_N.txt.
        """
        folder, writes = Path(folder), writes or Writes()
        finite, written = np.isfinite(result["scores"]), []
        names = [f"{kind}{self.mark}" for kind in ("trials", "nan_trials")]
        for name, chosen in zip(names, (finite, ~finite)):
            index = np.flatnonzero(chosen)
            if len(index):
                sides = [[side[i] for i in index] for side in (self.first, self.second)]
                path = folder / f"{name}_epoch_{result['epoch']}.txt"
                write = functools.partial(
                    write_scores, path, result["scores"][index], self.labels[index], sides[0], sides[1]
                )
                if not writes.write(path, write):
                    return
                written.append(path)
        own = re.compile(
            rf"({'|'.join(map(re.escape, names))})_epoch_\d+\.txt"
        )  # and no more: other lists have names too
        for old in sorted({path for path in folder.glob("*.txt") if own.fullmatch(path.name)} - set(written)):
            writes.remove(old)

    @functools.cached_property
    def calibrator(self) -> Calibrator:
        """What learns a calibration on the trials."""
        return Calibrator(self.config, self, self.trained_on)

    def keep_best(self, files, weights: dict, result: dict, write):
        """Write model_best.calibration of the evaluated weights by ``write(path, bytes)``, and the pictures."""
        self.calibrator.keep(files.model / "model_best.calibration", weights, result, write)
        for path in self.draw(files.result, result, files.writes):
            if path.suffix == ".png":
                files.picture(path, result["epoch"])

    def draw(self, folder, result, writes=None) -> list[Path]:
        """Write the pictures of a result, if ``picture_format`` wants any."""
        if self.config.picture_format == "none":
            return []
        finite = np.isfinite(result["scores"])
        costs, write = (self.config.dcf_c_miss, self.config.dcf_c_fa), (writes or Writes()).write_bytes
        scores, labels, formats = result["scores"][finite], self.labels[finite], (self.config.picture_format,)
        return plots.draw_all(folder, scores, labels, result, result["llrs"], costs, write, formats)


def without_scores(result: dict) -> dict:
    """A result, and those of other lists in it, without the scores and their likelihood ratios."""
    kept = {k: v for k, v in result.items() if k not in (*ARRAYS, "others")}
    others = {name: without_scores(other) for name, other in result.get("others", {}).items()}
    return {**kept, "others": others} if others else kept


def tensor_in_words(x) -> str:
    """Shape, range and non-finite values of a tensor in a few words."""
    finite = x[x.isfinite()].float()
    values = f"{float(finite.min()):.4g} to {float(finite.max()):.4g}" if finite.numel() else "nothing finite"
    return f"{tuple(x.shape)} {values}, {int(x.isnan().sum())} NaN, {int(x.isinf().sum())} Inf"


def describe(result: dict, config: Config) -> list[str]:
    """Say an evaluation in lines for the terminal, that of the list that decides first."""
    lines = describe_list(result, config, result.get("list", ""))
    for name, other in result.get("others", {}).items():
        lines += describe_list(other, config, name, f"_{name}")
    return lines


def describe_list(result: dict, config: Config, name: str = "", mark: str = "") -> list[str]:
    """Say the evaluation of one list; ``name`` of several, ``mark`` in the names of its files."""
    lines = list(result.get("notes", ()))
    for file in result["nan_files"][:10]:
        lines.append(f"test file {file['path']}: {file['reason']}; spoils {plural(file['trials'], 'trial')}")
        lines.append(f"  {file['statistics']}")
    if len(result["nan_files"]) > 10:
        lines.append(f"... and {plural(len(result['nan_files']) - 10, 'more file')}")
    if result["nan_scores"]:
        lines.append(
            f"{result['nan_scores']} scores are non-finite ({result['nan_targets']} of target trials): "
            f"result/nan_trials{mark}_epoch_{result['epoch']}.txt, the first of them:"
        )
        lines += [f"  {pair}" for pair in result["nan_pairs"]]
    head = f"Epoch {result['epoch']}  {f'{name}  ' if name else ''}"
    if result["failed"]:
        return [*lines, f"{head}evaluation failed: {result['failed']}"]
    p = config.dcf_p_target
    over = "speakers" if result["interval"] == "speakers" else f"trials: {result['no_speakers']}"
    eer = f"EER {result['eer']:.2f} % (95 % CI {result['eer_low']:.2f} to {result['eer_high']:.2f} over {over})"
    if result["nan_scores"]:
        eer = (
            f"EER {result['eer']:.2f} % without the removed trials, {result['eer_worst']:.2f} % counting them as errors"
        )
    dcf = "  ".join(f"minDCF({prior:g}) {result[f'min_dcf_{prior:g}']:.4f}" for prior in sorted({0.01, p}))
    lines.append(f"{head}{eer}  {dcf}")
    lines.append(
        f"  actDCF({p:g}) {result[f'act_dcf_{p:g}']:.4f}  Cllr {result['cllr']:.4f} bit (calibrated, folds over "
        f"{result['folds']}; at best {result['min_cllr']:.4f})"
        f"  threshold {result['threshold']:.4f}  {result['trials']} trials, {result['targets']} targets"
    )
    caution = wrong_way_round(result["eer"], result["eer_low"])
    return [*lines, caution] if caution else lines


def write_evaluation(files, evaluator, result: dict, config: Config, step: int):
    """Write an evaluation to scores.txt, metrics.jsonl, TensorBoard and the trials files."""
    if not files.main:
        return
    epoch, others = result["epoch"], result.get("others", {})
    evaluator.write_trials(files.result, result, files.writes)
    for one in evaluator.others:
        one.write_trials(files.result, others[one.source.name], files.writes)
    values = event_values(result)
    more = {"lists": {name: event_values(other) for name, other in others.items()}} if others else {}
    files.event("eval", epoch=epoch, step=step, **values, **more)
    write_figures(files, result, values, config, "")
    for name, other in others.items():
        write_figures(files, other, event_values(other), config, name)


def event_values(result: dict) -> dict:
    """What the event of an evaluation tells of a result."""
    left_out = (*ARRAYS, "epoch", "nan_files", "nan_pairs", "notes", "others")
    values = {k: v for k, v in result.items() if k not in left_out}
    bad = [file["path"] for file in result["nan_files"][:MOST_NAMED]]
    return {**values, **({"nan_files": bad} if bad else {})}


def write_figures(files, result: dict, values: dict, config: Config, name: str):
    """Write the figures of one list to scores.txt and TensorBoard; ``name`` of one that does not decide."""
    epoch, of_list, folder = result["epoch"], f" of {name}" if name else "", f"Val/{name}/" if name else "Val/"
    files.scalar(f"{folder}NaNScores", result["nan_scores"], epoch)
    if result["failed"]:
        files.score_line(f"Epoch {epoch}, evaluation{of_list} failed: {result['failed']}")
        return
    dcf, threshold = result[f"min_dcf_{config.dcf_p_target:g}"], result["threshold"]
    files.score_line(f"Epoch {epoch}, VEER{of_list} {result['eer']:.4f}, MinDCF {dcf:.5f}, Threshold {threshold:.6f}")
    tags = {"eer": "EER", f"min_dcf_{config.dcf_p_target:g}": "MinDCF"}
    for key, value in values.items():
        if isinstance(value, float):
            files.scalar(f"{folder}{tags.get(key, key)}", value, epoch)
