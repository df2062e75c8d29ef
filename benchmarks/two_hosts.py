"""Two hosts of one core each against one host with the same two cores, and what a slow link costs.

The hosts are namespaces of this machine with their own network, joined by a bridge (see tests/helpers/hosts.py). Arms
alternate. Each is a whole run of the reference network on synthetic images; its steady-state throughput counts.

    python benchmarks/two_hosts.py --pairs 6
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import Figure, Goal, arguments, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers.hosts import Host, hosts

EPOCHS = 2
LINKS = {"1 ms": ("delay", "1ms"), "10 ms": ("delay", "10ms"), "100 Mbit/s": ("rate", "100mbit")}
WORDS = (
    *("data=synthetic", "data.test_count=512", "devices=cpu", "devices.count=2", "train.log_every=2"),
    *(f"train.epochs={EPOCHS}", "tracking=none", "progress=quiet", "hydra.run.dir=run"),
)
SHOWN = {
    "time_split/step": "steps",
    "time_split/communication": "exposed communication",
    "time_split/data": "data",
    "communication/between_hosts/bytes_per_second": "bytes/s between hosts",
    "communication/between_hosts/seconds_per_step": "seconds of an all-reduce between hosts",
}


def main() -> None:
    options = arguments(__doc__, pairs=6, steps=20).parse_args()
    words = (*WORDS, f"data.train_count={512 * options.steps}")
    one, two = list[dict[str, float]](), list[dict[str, float]]()
    for number in range(options.pairs):
        arms = [lambda: one.append(on_one_host(words)), lambda: two.append(on_two_hosts(words))]
        for arm in arms[:: 1 if number % 2 else -1]:
            arm()
    ratios = [b["steady_images_per_second"] / a["steady_images_per_second"] for a, b in zip(one, two, strict=True)]
    rows = [
        Figure.of("two hosts of one core / one host of two cores", ratios, goal=Goal(">=", 0.97)),
        *figures("one host", one),
        *figures("two hosts", two),
    ]
    publish("two_hosts", rows)
    for name, netem in LINKS.items() if can_slow_down() else ():
        slow = on_two_hosts(words, netem)
        share = slow["steady_images_per_second"] / two[-1]["steady_images_per_second"]
        rows += [Figure.of(f"two hosts, {name} / as they are", [share]), *figures(f"two hosts, {name}", [slow])]
    publish("two_hosts", rows)


def can_slow_down() -> bool:
    """Whether this kernel has netem."""
    with hosts(1, "netem") as (host,):
        try:
            host.slow_down("delay", "1ms")
        except subprocess.CalledProcessError as error:
            print(f"NOT RUN: slow links. This kernel has no netem: {error.stderr.decode().strip()}")
            return False
    return True


def figures(arm: str, runs: Sequence[dict[str, float]]) -> list[Figure]:
    """Throughput and time split of an arm."""
    names = {"steady_images_per_second": "images/s", **SHOWN}
    return [Figure.of(f"{arm}: {text}", [run[name] for run in runs]) for name, text in names.items() if name in runs[0]]


def on_one_host(words: Sequence[str]) -> dict[str, float]:
    """Train with two ranks on one host. Returns its metrics."""
    with hosts(1, "one") as (host,):
        command = host.start(*words, hosts=1)
        code, errors = command.ended(600)
        assert code == 0, errors
        return metrics(host)


def on_two_hosts(words: Sequence[str], netem: Sequence[str] = ()) -> dict[str, float]:
    """Train with one rank on each of two hosts, each on a core of its own. Returns the metrics."""
    cores = sorted(os.sched_getaffinity(0))
    with hosts(2, "two") as pair:
        if netem:
            for host in pair:
                host.slow_down(*netem)
        commands = [host.start(*words, cores=[cores[host.rank]]) for host in reversed(pair)]
        for command in commands:
            code, errors = command.ended(600)
            assert code == 0, errors
        return metrics(pair[0])


def metrics(host: Host) -> dict[str, float]:
    """The last value of each metric."""
    found: dict[str, float] = {}
    for line in (host.folder / "run" / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line)["metrics"]
    return found


if __name__ == "__main__":
    main()
