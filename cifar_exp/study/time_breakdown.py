"""Time breakdown of the runs at one device count: in total, by rank, and for the gradient all-reduce."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from cifar_exp.distributed.rank_times import by_rank, straggler

PREFIXES = ("time_split/", "rank_time/", "communication/")  # of the metrics about time
PARTS = (
    *("computing", "data", "exposed all-reduce", "waiting for the slowest rank"),
    *("evaluation", "start-up and other"),
)
RANK_HEADINGS = {
    "compute": "computing, s",
    "hidden_communication": "overlapped communication, s",
    "communication": "exposed communication, s",
    "waiting": "waiting for the slowest rank, s",
    "data": "data, s",
    "evaluation": "evaluation, s",
}


@dataclass(frozen=True)
class Breakdown:
    """Medians over the runs at one device count.

    Attributes:
        devices: number of ranks.
        shares: of a run's total time by ``PARTS``, 0 to 1, which add up to about 1. Ranks' times are averaged. Unknown
            parts are left out.
        ranks: seconds of each rank by ``rank_times.NAMES``, and ``last_share``; empty for a single rank.
        notes: sentences for the report.
    """

    devices: int
    shares: Mapping[str, float]
    ranks: Sequence[Mapping[str, float]]
    notes: Sequence[str]

    @classmethod
    def of(cls, devices: int, runs: Sequence[Mapping[str, float]], steps: int | None) -> "Breakdown | None":
        """From the last values of the runs' metrics; None without time metrics.

        ``steps``: training steps of a run, if known.
        """
        runs = [metrics for metrics in runs if any(name.startswith("time_split/") for name in metrics)]
        if not runs:
            return None
        each = [_shares(metrics) for metrics in runs]
        known = [part for part in PARTS if all(part in shares for shares in each)]
        shares = {part: median(shares[part] for shares in each) for part in known}
        of_runs = [ranks for metrics in runs if (ranks := by_rank(metrics))]
        ranks = [
            {
                name: median(of_run[rank][name] for of_run in of_runs)
                for name in set.intersection(*(set(of_run[rank]) for of_run in of_runs))
            }
            for rank in range(min(map(len, of_runs), default=0))
        ]
        late = straggler(ranks)
        notes = [f"warning: on {devices} devices: {late}"] if late else []
        if unknown := [part for part in PARTS if part not in shares]:
            notes.append(f"on {devices} devices: {' and '.join(unknown)} were not measured and are part of computing")
        return cls(devices, shares, ranks, notes + _link_notes(devices, runs, ranks, steps))


def rank_table(breakdowns: Sequence[Breakdown]) -> list[list[str]]:
    """A row for each rank of each device count, headings first; empty if all runs had a single rank."""
    rows = [
        [
            str(breakdown.devices),
            str(rank),
            *(f"{times[name]:,.2f}" if name in times else "" for name in RANK_HEADINGS),
            f"{times['last_share']:.0%}" if "last_share" in times else "",
        ]
        for breakdown in breakdowns
        for rank, times in enumerate(breakdown.ranks)
    ]
    return [["devices", "rank", *RANK_HEADINGS.values(), "slowest rank"], *rows] if rows else []


def _shares(metrics: Mapping[str, float]) -> dict[str, float]:
    split = {
        name.removeprefix("time_split/"): value for name, value in metrics.items() if name.startswith("time_split/")
    }
    total, ranks = sum(split.values()), by_rank(metrics)

    def seconds_of(name: str, alone: str) -> float | None:
        if not ranks:
            return split.get(alone, 0.0)
        return fmean(times[name] for times in ranks) if all(name in times for times in ranks) else None

    measured = {
        "computing": seconds_of("compute", "step"),
        "data": seconds_of("data", "data"),
        "exposed all-reduce": seconds_of("communication", "communication"),
        "waiting for the slowest rank": seconds_of("waiting", ""),
        "evaluation": split.get("evaluation", 0.0),  # it includes the final test, which ranks do not measure
    }
    seconds = {part: value for part, value in measured.items() if value is not None}
    seconds["start-up and other"] = total - sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def _link_notes(
    devices: int, runs: Sequence[Mapping[str, float]], ranks: Sequence[Mapping[str, float]], steps: int | None
) -> list[str]:
    """Bytes sent per step, the bandwidth of the link, and the measured communication time."""
    known = [metrics for metrics in runs if "communication/link_bytes_per_second" in metrics]
    if not known or not known[0]["communication/bytes_per_step"]:
        return []
    sent = median(metrics["communication/bytes_per_step"] for metrics in known)
    link = median(metrics["communication/link_bytes_per_second"] for metrics in known)
    sentence = (
        f"on {devices} devices: each rank sends {sent / 1e6:.3g} MB per step; the link carries {link / 1e9:.3g} GB/s, "
        f"so that takes {1000 * sent / link:.3g} ms"
    )
    if steps and ranks and "last_share" in ranks[0]:
        # Take the smallest time over ranks: an all-reduce in flight also waits for the slowest rank.
        exposed, hidden = (
            1000 * min(times[name] for times in ranks) / steps for name in ("communication", "hidden_communication")
        )
        sentence += f"; a step took {exposed:.3g} ms of exposed and {hidden:.3g} ms of overlapped communication"
    return [sentence]
