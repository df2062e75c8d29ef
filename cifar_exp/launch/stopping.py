"""How the launcher handles signals that stop a run: the ranks save, then end."""

import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

from cifar_exp.distributed.stop_requests import INTERRUPT_FILE
from cifar_exp.errors import Stopped
from cifar_exp.launch import rank_processes
from cifar_exp.system.printable import print_notice
from cifar_exp.system.signals import answer_once, is_repeated, other_handler, signals_to_answer

GRACE_SECONDS = 7.0  # seconds after a signal in which ranks may finish their step and save


@dataclass
class GracefulStop:
    """Stop the ranks gracefully on a stop signal, while the context is open.

    The first signal asks the ranks to finish their step and save. They are killed after ``GRACE_SECONDS`` seconds
    (elastic would wait half a minute for a suspended rank) or at the second signal. If the calling program had its own
    handler for the signal, it is called after the ranks have ended: submitit's handler requeues the job. The end of the
    context raises ``Stopped`` for the first signal. Outside the main thread, signals are not handled.

    Attributes:
        ipc_dir: the folder that ranks and launcher share.
        received: the first signal; None before it.
    """

    ipc_dir: Path
    received: Stopped | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in signals_to_answer()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._before:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._restore()
        if not self.received:
            return
        if handler := other_handler(self._before[self.received.number]):
            handler(self.received.number, None)
        if kind is None:
            raise self.received

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.received = Stopped(number)
        for signal_number in signals_to_answer():
            signal.signal(signal_number, self._end)
        answer_once(number)
        with suppress(OSError):  # the folder was removed, and the watchdog ends the ranks
            (self.ipc_dir / INTERRUPT_FILE).write_text(str(number))
        print_notice("the ranks finish their step and save; a second signal ends them at once")
        signal.signal(signal.SIGALRM, self._end)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        assert self.received
        if is_repeated(self.received, number):
            return
        self._restore()
        rank_processes.kill_ranks()
        raise self.received

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
