"""How long a sink may take after the end of a run."""

import math
import time

ANSWER_SECONDS, CLOSING_SECONDS = 30.0, 120.0  # the two deadlines of a run that a signal did not end
# Replaces ANSWER_SECONDS when every call so far has failed and the run lasted longer than ANSWER_SECONDS.
REFUSED_SECONDS = 5.0
# Both deadlines of a run that a signal ended, counted from the signal. The ranks may have used most of them.
STOPPED_SECONDS = 8.2
# The minimum for each sink. The page, the tracker and the sweep together then take less than ten seconds.
LEAST_SECONDS = 0.8


class Deadlines:
    """The two deadlines of a sink. They are infinite before the run has ended.

    By the first one the sink must accept something; each success moves it. By the second one it must be closed.
    """

    def __init__(self) -> None:
        self._began, self._ended = time.monotonic(), math.inf
        self._answer_seconds = self._answer_by = self._close_by = math.inf
        self._has_answered = False

    def run_ended(self, answer_seconds: float, closing_seconds: float) -> None:
        """Start both deadlines.

        Args:
            answer_seconds: seconds without a successful call before the sink is abandoned. It is REFUSED_SECONDS if
                every call so far has failed, and longer while the sink opens.
            closing_seconds: the sink is abandoned after this time in any case.
        """
        self._ended = time.monotonic()
        self._answer_seconds, self._answer_by = answer_seconds, self._ended + answer_seconds
        self._close_by = self._ended + closing_seconds

    def answered(self) -> None:
        """A call has succeeded."""
        self._has_answered, self._answer_by = True, time.monotonic() + self._answer_seconds

    def left(self, has_failed: bool) -> float:
        """Seconds until the sink is abandoned.

        Args:
            has_failed: whether the last call failed.
        """
        if self._has_answered:
            answer_by = self._answer_by
        elif has_failed:  # every call so far
            answer_by = max(self._ended + REFUSED_SECONDS, min(self._answer_by, self._began + ANSWER_SECONDS))
        else:  # the sink opens slowly, as on a busy machine
            answer_by = max(self._answer_by, self._began + CLOSING_SECONDS)
        return min(answer_by, self._close_by) - time.monotonic()


def seconds_after_signal(received: float) -> float:
    """Seconds for a sink after a signal that was received at this time of the monotonic clock."""
    return max(LEAST_SECONDS, received + STOPPED_SECONDS - time.monotonic())
