"""Prepare the next items in a thread while the current one is used."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterable[T], count: int, enter: Callable[[], None] = lambda: None) -> Iterator[T]:
    """Yield the same items, produced by a thread that is up to ``count`` items ahead. It ends with this iterator.

    Args:
        items: produced in the thread; their exceptions are raised here.
        count: the maximum number of waiting items.
        enter: called first in the thread.
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

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
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
        while thread.is_alive():  # it may be waiting for a free place
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                continue
        thread.join()
