"""Fetch the next batch while the current one trains."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], count: int, enter: Callable[[], None] = lambda: None) -> Iterator[T]:
    """The same items, made by a thread that is up to ``count`` ahead; it ends when this iterator does.

    Args:
        items: made in the thread; what they raise is raised here.
        count: items that wait at most.
        enter: called in the thread first.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(count)
    closed = threading.Event()

    def work() -> None:
        try:
            enter()
            for item in items:
                ready.put((item, None))
                if closed.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=work, name="images ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        while thread.is_alive():  # it may be waiting for room
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                continue
        thread.join()
