"""Experiment trackers beside TensorBoard, by the key ``tracker``: Weights & Biases and MLflow, if one is installed."""

import hashlib
import os
from pathlib import Path

from config import Config
from errors import first_line
from training.writes import log

PROJECT = "speaker-recognition"  # if WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME name no other
MOST_PARAMETERS, LONGEST_VALUE = 100, 500  # of a call of mlflow.log_params


def axis_of(tag: str) -> str:
    """What a tag is drawn over: points of steps over steps, all else over epochs."""
    return "step" if tag.startswith("Step/") else "epoch"


class WeightsAndBiases:
    """A run of W&B; resumed, it is the same one. WANDB_MODE=offline keeps all of it below ``save_path``."""

    def __init__(self, config: Config):
        import wandb

        place = Path(config.save_path).absolute()
        name = {"name": place.name, "id": hashlib.sha256(os.fsencode(place)).hexdigest()[:16], "resume": "allow"}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.run = wandb.init(project=project, dir=config.save_path, config=config.values(), **name)
        for group in ("Step", "Train", "Val"):
            self.run.define_metric(f"{group}/*", step_metric=axis_of(f"{group}/"))

    def scalar(self, tag: str, value: float, step: int):
        """Log a number."""
        self.run.log({tag: value, axis_of(tag): step})

    def picture(self, tag: str, path: Path, step: int):
        """Log a picture."""
        import wandb

        self.run.log({tag: wandb.Image(str(path)), axis_of(tag): step})

    def close(self):
        """Send what is left."""
        self.run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI; resumed, it is the same one."""

    def __init__(self, config: Config):
        import mlflow

        note, name = Path(config.save_path, "logs", "mlflow_run.txt"), Path(config.save_path).absolute().name
        known = note.read_text(encoding="ascii").strip() if note.is_file() else None
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(PROJECT)
        self.mlflow, self.run = mlflow, mlflow.start_run(run_id=known, run_name=None if known else name)
        note.write_text(self.run.info.run_id, encoding="ascii")
        values = [] if known else [(key, str(value)[:LONGEST_VALUE]) for key, value in config.values().items()]
        for first in range(0, len(values), MOST_PARAMETERS):
            mlflow.log_params(dict(values[first : first + MOST_PARAMETERS]))

    def scalar(self, tag: str, value: float, step: int):
        """Log a number."""
        self.mlflow.log_metric(tag, value, step=step)

    def picture(self, tag: str, path: Path, step: int):
        """Keep a picture."""
        self.mlflow.log_artifact(str(path), f"epoch_{step}")

    def close(self):
        """End the run."""
        self.mlflow.end_run()


TRACKERS = {"wandb": WeightsAndBiases, "mlflow": MLflow}


class Tracker:
    """A tracker whose failures end no run: the first one is said, and nothing is sent any more."""

    def __init__(self, config: Config):
        self.name, self.tracker = config.tracker, None
        self._attempt(lambda: TRACKERS[config.tracker](config), keep=True)

    def call(self, method: str, *arguments):
        """Call ``scalar``, ``picture`` or ``close`` of the tracker."""
        if self.tracker is not None:
            self._attempt(lambda: getattr(self.tracker, method)(*arguments))

    def _attempt(self, action, keep=False):
        try:
            result = action()
        except Exception as error:  # of a network, a server or a package of others: any kind
            self.tracker = None
            log(f"tracker: {self.name}: {type(error).__name__}: {first_line(error)}; the run goes on without it")
        else:
            self.tracker = result if keep else self.tracker
