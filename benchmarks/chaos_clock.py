"""trainSpeakerNet.py with a clock that jumps by a day, forth and back, at every hundredth look at it."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

looks, real = [0], time.time


def jumping() -> float:
    """The time of day, or that of tomorrow."""
    looks[0] += 1
    return real() + 86_400 * (looks[0] // 100 % 2)


if __name__ == "__main__":
    time.time = jumping
    import trainSpeakerNet

    sys.exit(trainSpeakerNet.command())
