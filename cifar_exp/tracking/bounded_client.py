"""An MLflow client whose calls have a time limit. MLflow limits only the seconds without data: a slow server passes."""

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from cifar_exp.system.redaction import masked_text

CALL_SECONDS = 60.0  # for a call with a small answer; twice MLFLOW_HTTP_REQUEST_TIMEOUT if that is longer
SLOWEST_UPLOAD = 50_000  # bytes a second
MOST_HANGING = 8  # calls of this process that are over their limit and still running


class NoAnswerError(Exception):
    """A call has not ended in time."""


_hanging: list[threading.Thread] = []  # of this process


class BoundedClient:
    """Passes calls on to an MLflow client; each call has a time limit.

    A call over its limit keeps its thread until the server closes the connection. With
    ``MOST_HANGING`` of them, further calls fail at once.
    """

    def __init__(self, client: Any, address: str) -> None:
        """``address``: of the store, for messages."""
        self._client, self._address = client, masked_text(address)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return partial(self._call, name, method) if callable(method) else method

    def _call(self, name: str, method: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        seconds = _limit(name, arguments)
        problem = f"{self._address}: the server has sent no whole answer in {seconds:.0f} s"
        _hanging[:] = [thread for thread in _hanging if thread.is_alive()]
        if len(_hanging) >= MOST_HANGING:
            raise NoAnswerError(problem)
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(method(*arguments, **more))
            except BaseException as error:
                answer.set_exception(error)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
        thread.start()
        try:
            return answer.result(seconds)
        except TimeoutError as error:
            if answer.done():  # the call's own error
                raise
            _hanging.append(thread)
            raise NoAnswerError(problem) from error


def _limit(name: str, arguments: tuple[Any, ...]) -> float:
    """Seconds for a call of the client's method ``name``."""
    try:
        patience = 2 * float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "0"))
    except ValueError:
        patience = 0.0
    size = 0
    if name == "log_artifact" and len(arguments) > 1:
        path = Path(arguments[1])
        size = path.stat().st_size if path.exists() else 0
    return max(CALL_SECONDS, patience) + size / SLOWEST_UPLOAD
