"""How much of a conversation identify.py --along names rightly: utterances of a set joined to conversations.

python benchmarks/timeline.py --initial_model M --list SET/trial_list.txt --root SET/wav     # lines 'speaker path'

In each conversation half of the speakers teach the calibration (a whole utterance against a window of another one), up
to five of the others are enrolled by two utterances, and the rest are strangers. A turn is one to four utterances that
were not enrolled; strangers have three turns in ten. Each moment counts, 10 ms apart.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile

from corpus.audio import read_crop
from scoring.calibration import LogisticCalibration
from scoring.cosine import length_normalize
from scoring.timeline import Timeline
from speaker_model import load_model

ENROLLED, TURNS, PRIOR = 5, 20, 0.7


class Utterances:
    """The utterances of a list: their waves, and embeddings of each as a whole and of a window in its middle."""

    def __init__(self, model, path, root, window: float):
        rows = [line.split(maxsplit=1) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        self.speakers = np.array([speaker for speaker, _ in rows])
        self.waves = [read_crop(Path(root, name), sample_rate=model.sample_rate).x for _, name in rows]
        size = round(window * model.sample_rate)
        middles = [x[max(0, (len(x) - size) // 2) :][:size] for x in self.waves]
        self.whole = length_normalize(np.stack([model.embed(x) for x in self.waves]))
        self.windows = length_normalize(np.stack([model.embed(x) for x in middles]))

    def calibration(self, speakers) -> LogisticCalibration:
        """Cosines of a whole utterance and a window of another one to log-likelihood ratios."""
        rows = np.flatnonzero(np.isin(self.speakers, speakers))
        a, b = (x.ravel() for x in np.meshgrid(rows, rows))
        a, b = a[a != b], b[a != b]
        return LogisticCalibration.fit((self.whole[a] * self.windows[b]).sum(1), self.speakers[a] == self.speakers[b])


def conversation(said: Utterances, rng):
    """A wave, the speaker of each of its samples (-1: a stranger), the enrolled models and the calibration."""
    order = rng.permutation(np.unique(said.speakers))
    half = len(order) // 2
    gallery, strangers = order[half:][:ENROLLED], order[half:][ENROLLED:]
    models, left = [], {}
    for speaker in order[half:]:
        own = rng.permutation(np.flatnonzero(said.speakers == speaker))
        if speaker in gallery:
            models.append(said.whole[own[:2]].mean(0))
            own = own[2:]
        left[speaker] = own
    pieces, owners, last = [], [], None
    for _ in range(TURNS):
        group = gallery if rng.random() < PRIOR or not len(strangers) else strangers
        speaker = rng.choice([who for who in group if who != last])
        last = speaker
        chosen = rng.choice(left[speaker], min(rng.integers(1, 5), len(left[speaker])), replace=False)
        wave = np.concatenate([said.waves[i] for i in chosen])
        pieces.append(wave)
        who = np.flatnonzero(gallery == speaker)
        owners.append(np.full(len(wave), who[0] if len(who) else -1))
    return (
        np.concatenate(pieces),
        np.concatenate(owners),
        length_normalize(np.stack(models)),
        said.calibration(order[:half]),
    )


def share_right(timeline: Timeline, owners, rate: int) -> float:
    """Share of the moments whose speaker, or that it is nobody, is decided rightly."""
    at = np.arange(0, len(owners), rate // 100)
    cell = np.clip(np.searchsorted(timeline.edges, at / rate, "right") - 1, 0, len(timeline.decided) - 1)
    decided = timeline.decided[cell]
    return float(np.mean(np.where(decided == len(timeline.names), -1, decided) == owners[at]))


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--initial_model", required=True)
    parser.add_argument("--list", required=True, help="lines 'speaker path'")
    parser.add_argument("--root", required=True, help="folder of the paths")
    parser.add_argument("--conversations", type=int, default=10)
    parser.add_argument("--window", type=float, default=3.0)
    parser.add_argument("--step", type=float, default=1.0)
    parser.add_argument("--turn", type=float, nargs="+", default=[0.001, 2, 5, 10, 20, 40], help="0.001: no smoothing")
    args = parser.parse_args()
    model = load_model(args.initial_model)
    said, rng = Utterances(model, args.list, args.root, args.window), np.random.default_rng(0)
    right, promised, seconds = [], [], 0.0
    for _ in range(args.conversations):
        wave, owners, models, calibration = conversation(said, rng)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "conversation.wav")
            soundfile.write(path, wave, model.sample_rate, subtype="FLOAT")
            times, x, reasons = model.embed_windows(path, args.window, args.step)
        heard = np.array([i not in reasons for i in range(len(times))])
        llrs = calibration.llrs((length_normalize(np.nan_to_num(x)) @ models.T).ravel()).reshape(len(x), -1)
        names = [str(i) for i in range(len(models))]
        found = [Timeline(names, times, llrs, heard, PRIOR, turn, args.step) for turn in args.turn]
        right.append([share_right(timeline, owners, model.sample_rate) for timeline in found])
        promised.append([timeline.posteriors.max(axis=1).mean() for timeline in found])
        seconds += len(wave) / model.sample_rate
    print(f"{args.conversations} conversations, {seconds:.0f} s; windows of {args.window:g} s every {args.step:g} s")
    print("| turn (s) | time named rightly | least and most | promised |", "| --- | --- | --- | --- |", sep="\n")
    for turn, shares, said_so in zip(args.turn, np.transpose(right), np.transpose(promised)):
        span = f"{100 * shares.min():.0f} to {100 * shares.max():.0f} %"
        print(f"| {turn:g} | {100 * shares.mean():.1f} % | {span} | {100 * said_so.mean():.1f} % |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
