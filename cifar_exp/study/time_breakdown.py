"""Where the time of the runs at one device count went: in all, by rank, and for sending gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from cifar_exp.distributed.rank_times import by_rank, straggler

PREFIXES = ("time_split/", "rank_time/", "communication/")  # of the metrics that say where time went
PARTS = ("computing", "data", "averaging gradients", "waiting for the slowest", "evaluation", "start and rest")
RANK_HEADINGS = {
    "compute": "computing, s",
    "hidden_communication": "averaging meanwhile, s",
    "communication": "averaging exposed, s",
    "waiting": "waiting for the slowest, s",
    "data": "data, s",
    "evaluation": "evaluation, s",
}


@dataclass(frozen=True)
class Breakdown:
    """Medians over the runs at one device count.

    Attributes:
        devices: number of ranks.
        shares: of a whole run's time by ``PARTS``, 0 to 1; they add up to about 1. Ranks' times are averaged. A
            part that is not known is left out.
        ranks: seconds of each rank by ``rank_times.NAMES``, and ``last_share``; none for a lone rank.
        notes: what a reader should know, in sentences.
    """

    devices: int
    shares: Mapping[str, float]
    ranks: Sequence[Mapping[str, float]]
    notes: Sequence[str]

    @classmethod
    def of(cls, devices: int, runs: Sequence[Mapping[str, float]], steps: int | None) -> "Breakdown | None":
        """From the last values of the runs' metrics; None where they do not say where time went.

        ``steps``: that a run trained, where it is known.
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
            notes.append(f"on {devices} devices: {' and '.join(unknown)} cannot be told from computing, which has them")
        return cls(devices, shares, ranks, notes + _link_notes(devices, runs, ranks, steps))


def rank_table(breakdowns: Sequence[Breakdown]) -> list[list[str]]:
    """A row a rank of each device count, headings first; none where all ran on lone ranks."""
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
    return [["devices", "rank", *RANK_HEADINGS.values(), "last to come"], *rows] if rows else []


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
        "averaging gradients": seconds_of("communication", "communication"),
        "waiting for the slowest": seconds_of("waiting", ""),
        "evaluation": split.get("evaluation", 0.0),  # with the test at the end, which ranks do not measure
    }
    seconds = {part: value for part, value in measured.items() if value is not None}
    seconds["start and rest"] = total - sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def _link_notes(
    devices: int, runs: Sequence[Mapping[str, float]], ranks: Sequence[Mapping[str, float]], steps: int | None
) -> list[str]:
    """What a step sends beside what the link carries, and what it took."""
    known = [metrics for metrics in runs if "communication/link_bytes_per_second" in metrics]
    if not known or not known[0]["communication/bytes_per_step"]:
        return []
    sent = median(metrics["communication/bytes_per_step"] for metrics in known)
    link = median(metrics["communication/link_bytes_per_second"] for metrics in known)
    told = (
        f"on {devices} devices: each rank sends {sent / 1e6:.3g} MB a step; the link carries {link / 1e9:.3g} GB/s, "
        f"which makes {1000 * sent / link:.3g} ms"
    )
    if steps and ranks and "last_share" in ranks[0]:
        # Of the rank that waited least for others: a bucket that is on its way waits for the slowest one, too.
        exposed, hidden = (
            1000 * min(times[name] for times in ranks) / steps for name in ("communication", "hidden_communication")
        )
        told += f"; a step took {exposed:.3g} ms exposed and {hidden:.3g} ms behind the backward pass"
    return [told]
