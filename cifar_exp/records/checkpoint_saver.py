"""Write checkpoints in a thread while training continues."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from cifar_exp.records.checkpoint import Checkpoint, CheckpointPosition, save


class CheckpointSaver:
    """Saves checkpoints in a background thread, one at a time, and keeps the newest ones and the best one."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        """``keep``: number of newest checkpoints to keep; older ones are deleted once a newer one is on disk."""
        self._run_dir, self._keep = run_dir, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(self, checkpoint: Checkpoint, position: CheckpointPosition) -> None:
        """Copy ``checkpoint`` and write it in the background; waits for the previous save.

        Raises:
            StorageError: the previous save has failed.
        """
        self.wait()
        copy = Checkpoint(**_on_cpu(vars(checkpoint)))
        self._saving = self._thread.submit(save, self._run_dir, copy, position, self._keep)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            StorageError: a checkpoint could not be written.
        """
        if self._saving:
            saving, self._saving = self._saving, None
            saving.result()

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()


def _on_cpu(state: Any) -> Any:
    """A deep copy of nested state on the CPU, which training does not modify."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_cpu(value) for value in state)
    return state
