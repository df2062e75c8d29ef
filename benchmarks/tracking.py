"""What MLflow costs: training time of the real command with every step logged, against ``tracking=none``.

``time/train_seconds`` of each run's own journal: batches and steps of one epoch of the reference recipe on one rank
with all cores, with the parent process feeding MLflow (SQLite) from the journal meanwhile. Start-up, evaluation and
the end of the run are not in it; the command's CPU seconds are those of the whole run.
"""

from functools import partial

from commands import Workplace, synthetic_data, workplace
from harness import Goal, arguments, compare, publish
from workload import BATCH


def main() -> None:
    options = arguments(__doc__, pairs=7, steps=20).parse_args()
    with workplace() as place:
        settings = [
            *synthetic_data(place.folder, options.steps * BATCH),
            "devices=cpu",
            "train.epochs=1",
            "train.log_every=1",
        ]
        on = partial(train_seconds, place, [*settings, "tracking=mlflow"])
        off = partial(train_seconds, place, [*settings, "tracking=none"])
        rows = [compare(f"MLflow / no tracking, {options.steps} steps", on, off, options.pairs, Goal("<=", 1.005))]
    publish("tracking", rows)


def train_seconds(place: Workplace, overrides: list[str]) -> float:
    return place.run(overrides).metrics["time/train_seconds"]


if __name__ == "__main__":
    main()
