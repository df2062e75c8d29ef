"""Which signals end a run in order. Imported before anything else is, so that they are answered from the start."""

import signal


def signals_to_answer() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM and the end of the terminal; not the latter under ``nohup``, or once it has been answered."""
    answered = [signal.SIGINT, signal.SIGTERM]
    return answered if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*answered, signal.SIGHUP]


def answer_once(number: int) -> None:
    """A terminal that is closed sends its signal twice, by the system and by the shell: that is no second wish."""
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)
