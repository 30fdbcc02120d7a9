"""trainSpeakerNet.py with each trained row written down in the file CHAOS_ROWS; SIGTERM after CHAOS_STOP steps."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trainSpeakerNet
from training.step import Step

original, taken = Step.update, []


def update(step, window, *rest, **more):
    """Take the optimizer's step, and write down the rows it was taken for."""
    fault = original(step, window, *rest, **more)
    with open(os.environ["CHAOS_ROWS"], "a") as file:
        file.writelines(f"{info['path']}\n" for batch in window for info in batch["files"])
    taken.append(fault)
    if str(len(taken)) == os.environ.get("CHAOS_STOP") and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return fault


if __name__ == "__main__":
    Step.update = update
    sys.exit(trainSpeakerNet.command())
