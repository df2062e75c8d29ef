"""Heartbeats: each rank writes its progress to its own file, which the launcher reads."""

import struct
from pathlib import Path
from typing import NamedTuple

from cifar_exp.distributed.stop_requests import StopPoint

_BEAT = struct.Struct("5q")  # the fields of Heartbeat


class Heartbeat(NamedTuple):
    """A rank's newest heartbeat.

    Attributes:
        process: process id of the rank.
        point: the next stop point of the rank.
        stage: number of waits for other ranks that the rank has reached since the previous stop point.
        beats: heartbeats of the rank so far.
    """

    process: int
    point: StopPoint
    stage: int
    beats: int

    @property
    def progress(self) -> tuple[StopPoint, int]:
        """The rank's progress, for comparison. Of ranks that wait for each other, the hung rank has the lowest."""
        return self.point, self.stage

    @property
    def steps_trained(self) -> int:
        """Steps that the rank has trained, as far as the stop point shows."""
        return self.point.step if self.point.in_evaluation else max(0, self.point.step - 1)

    def packed(self) -> bytes:
        """The content of the rank's file."""
        return _BEAT.pack(self.process, *self.point, self.stage, self.beats)


def heartbeat_file(ipc_dir: Path, rank: int) -> Path:
    """The file of a rank's heartbeats in the folder that ranks and launcher share."""
    return ipc_dir / f"beat-{rank}"


def read_heartbeat(ipc_dir: Path, rank: int) -> Heartbeat | None:
    """The newest heartbeat of a rank; None before its first one."""
    try:
        process, step, in_evaluation, stage, beats = _BEAT.unpack(heartbeat_file(ipc_dir, rank).read_bytes())
    except (FileNotFoundError, struct.error):
        return None
    return Heartbeat(process, StopPoint(step, bool(in_evaluation)), stage, beats)
