"""A signal that asks a run to stop is remembered until the step in hand is over."""

import signal
import time


def catch_signals(trainer):
    """Turn the first SIGINT or SIGTERM into a clean stop, ``trainer.signal``; a second one acts at once."""
    caught_at = time.monotonic()

    def remember(number, frame):
        nonlocal caught_at
        now = time.monotonic()
        if trainer.signal is not None and now - caught_at > 2:  # launchers send a signal twice in an instant
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if trainer.signal is None:
            trainer.signal, caught_at = number, now

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
