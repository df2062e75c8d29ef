"""What MLflow costs: the real command with every step logged, against ``tracking=none``.

Figures of each run's own journal, over the steps of one epoch of the reference recipe on one rank with all cores, with
the parent process feeding MLflow (SQLite) from the journal meanwhile. The steady rate is the median over the steps:
what MLflow costs as long as a run goes on. ``time/train_seconds`` has the seconds in it that MLflow takes to be
imported, once, beside the first steps; start-up, evaluation and the end of the run are in neither. The command's CPU
seconds are those of the whole run.
"""

from functools import partial

from commands import Workplace, synthetic_data, workplace
from harness import Goal, arguments, compare, publish
from workload import BATCH


def main() -> None:
    options = arguments(__doc__, pairs=7, steps=40).parse_args()
    steps = f"{options.steps} steps"
    with workplace() as place:
        settings = [
            *synthetic_data(place.folder, options.steps * BATCH),
            "devices=cpu",
            "train.epochs=1",
            "train.log_every=1",
        ]
        rows = []
        for name, seconds, goal in (
            (f"MLflow / no tracking, a step of {steps}", step_seconds, Goal("<=", 1.005)),
            (f"MLflow / no tracking, import and {steps}", train_seconds, None),
        ):
            on = partial(seconds, place, [*settings, "tracking=mlflow"])
            off = partial(seconds, place, [*settings, "tracking=none"])
            rows.append(compare(name, on, off, options.pairs, goal))
    publish("tracking", rows)


def step_seconds(place: Workplace, overrides: list[str]) -> float:
    return BATCH / place.run(overrides).metrics["steady_images_per_second"]


def train_seconds(place: Workplace, overrides: list[str]) -> float:
    return place.run(overrides).metrics["time/train_seconds"]


if __name__ == "__main__":
    main()
