"""A signal that asks a run to stop is remembered until the step in hand is over."""

import signal
import time


class StopSignal:
    """The first SIGINT or SIGTERM of the process as ``number``, None before; a second one acts at once."""

    def __init__(self):
        self.number, self.caught_at = None, 0.0

    def catch(self):
        """Take the place of the handlers of SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        """Handle a signal."""
        now = time.monotonic()
        if self.number is None:
            self.number, self.caught_at = number, now
        elif now - self.caught_at > 2:  # launchers send a signal twice in an instant
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
