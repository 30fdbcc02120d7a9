"""What the number of processes changes of a run with the same rows in each step: losses, weights, scores, metrics.

python benchmarks/equal_processes.py --keys sync_batchnorm=true                   # 1, 2 and 4 processes, fp32
python benchmarks/equal_processes.py --keys sync_batchnorm=true --dtype float64
python benchmarks/equal_processes.py --worlds 2 --keys ddp_compress=bf16 --against ddp_compress=none

Each run is the real command: 208 steps of 16 rows over all processes, then an evaluation. It is compared with one
process, or with ``--against`` with as many under other keys. As a measure of what rounding alone becomes one process is
compared with one whose weights begin apart by half a unit in the last place. float64 makes weights, waveforms and all
that is computed of them double, where the product computes in fp32.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from several import outputs_of

ROOT = Path(__file__).resolve().parent.parent
MODEL = "ECAPA_TDNN channels=16 aggregate=32 n_mels=24 nOut=32"
HALF_A_UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}  # of a number's last place, relative
ROWS, EPOCHS = 16, 13  # of all processes; of 16 steps
PLACES = (1, 10, 50, 100, 200)
OF_TIME = ("utt_per_s", "data_wait_pct", "time", "gpu_memory_gb")


def in_double():
    """Let this process compute in double where it computes in fp32."""
    import torch

    import SpeakerNet as trainer

    original, forward = trainer.SpeakerNet.__init__, trainer.SpeakerNet.forward
    torch.Tensor.float = torch.Tensor.double

    def init(self, values):
        original(self, values)
        self.double()

    trainer.SpeakerNet.__init__ = init
    trainer.SpeakerNet.forward = lambda self, data, label=None: forward(self, data.double(), label)


def nudged(size: float):
    """Let the weights of this process begin apart from the others' by so much, relative to each, up or down."""
    import torch

    import SpeakerNet as trainer

    original = trainer.SpeakerNet.__init__

    def init(self, values):
        original(self, values)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            sign = torch.rand(parameter.shape, generator=generator).to(parameter.dtype).sub(0.5).sign()
            parameter.data.mul_(1.0 + size * sign)

    trainer.SpeakerNet.__init__ = init


def worker(spec: dict) -> int:
    """One process of a run, which notes its losses and a hash of what it ends with."""
    sys.path.insert(0, str(ROOT))
    import SpeakerNet as trainer
    import trainSpeakerNet
    from storage.dump import content_hash
    from training.incidents import Incidents

    if spec["dtype"] == "float64":
        in_double()
    if spec["nudge"]:
        nudged(spec["nudge"])
    losses, remember, close = [], Incidents.remember, trainer.ModelTrainer.close

    def noting(self, step, lr, attempt):
        losses.append(attempt.mean_loss)
        remember(self, step, lr, attempt)

    def closing(self):
        close(self)
        weights = content_hash(dict(self.network.named_parameters()))
        Path(spec["folder"], f"rank{self.ranks.rank}.json").write_text(json.dumps({"losses": losses, "hash": weights}))

    Incidents.remember, trainer.ModelTrainer.close = noting, closing
    return trainSpeakerNet.main(spec["words"])


def run(data: Path, folder: Path, dtype: str, world: int, keys: list[str], nudge: float = 0.0) -> dict:
    """Train with so many processes; returns losses of each step, lines of metrics.jsonl, scores and hashes."""
    name, *of_model = MODEL.split()
    words = [f"--model={name}", "--trainfunc=aamsoftmax", "--optimizer=sgd", "--scheduler=cosine", "--lr=0.005"]
    words += [f"--train_list={data}/train_list.txt", f"--train_path={data}/wav", f"--test_list={data}/trials.txt"]
    words += [f"--test_path={data}/wav", f"--save_path={folder}/run", f"--batch_size={ROWS // world}"]
    words += [f"--max_epoch={EPOCHS}", f"--test_interval={EPOCHS}", "--log_interval=1", "--nDataLoaderThread=0"]
    words += ["--max_frames=60", "--picture_format=none", "--eval_frames=0", "--device=cpu", "--threads=1"]
    words += [f"--{key}" for key in (*of_model, *keys)]
    spec = json.dumps({"dtype": dtype, "folder": str(folder), "words": words, "nudge": nudge})
    folder.mkdir()
    outputs_of([sys.executable, __file__, "--worker", spec], world)
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    lines = (folder / "run" / "result" / "metrics.jsonl").read_text().splitlines()
    events = [{k: v for k, v in json.loads(line).items() if k not in OF_TIME} for line in lines]
    scores = np.loadtxt(folder / "run" / "result" / f"trials_epoch_{EPOCHS}.txt", usecols=0)
    return {"losses": np.array(ranks[0]["losses"]), "events": events, "scores": scores, "ranks": ranks}


def compared(found: dict, base: dict) -> list[str]:
    """Cells: relative differences of losses up to some steps, of scores and metrics, and whether weights are one."""
    apart = np.abs(found["losses"] - base["losses"]) / np.abs(base["losses"])
    cells = [f"{apart[:place].max():.1e}" for place in PLACES]
    cells.append(f"{np.abs(found['scores'] - base['scores']).max():.1e}")
    ours, theirs = (
        np.array([v for e in run["events"] for v in e.values() if isinstance(v, (int, float))], dtype=float)
        for run in (found, base)
    )
    cells.append(f"{(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-3)).max():.1e}")
    cells.append("one" if len({rank["hash"] for rank in found["ranks"]}) == 1 else "SEVERAL")
    return [*cells, f"{found['losses'][-1]:.4f}"]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", default="2,4", help="numbers of processes (default 2,4)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--keys", default="", help="KEY=VALUE,.. of the runs")
    parser.add_argument("--against", default="", help="KEY=VALUE,.. to compare with, instead of one process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    sys.path.insert(0, str(ROOT))
    from make_demo_data import main as make

    keys, other = (list(filter(None, text.split(","))) for text in (args.keys, args.against))
    head = ["type", "keys", "processes", *(f"loss to step {n}" for n in PLACES), "scores", "metrics", "weights"]
    print(f"| {' | '.join([*head, 'last loss'])} |\n|{' --- |' * (len(head) + 1)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = ("--speakers=32", "--trial_speakers=8", "--utterances=8", "--seconds=0.9", "--nontargets=200")
        with contextlib.redirect_stdout(io.StringIO()):
            make(["--out", str(folder / "data"), *sizes])
        alone = None if other else run(folder / "data", folder / "1", args.dtype, 1, keys)
        if alone:
            found = run(folder / "data", folder / "1a", args.dtype, 1, keys, HALF_A_UNIT[args.dtype])
            print(f"| {' | '.join([args.dtype, 'nudged', '1', *compared(found, alone)])} |", flush=True)
        for world in map(int, args.worlds.split(",")):
            found = run(folder / "data", folder / f"{world}", args.dtype, world, keys)
            base = alone or run(folder / "data", folder / f"{world}a", args.dtype, world, [*keys, *other])
            cells = [args.dtype, args.keys or "none", str(world), *compared(found, base)]
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
