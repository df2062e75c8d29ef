"""The reference recipe (60 epochs) and ``experiment=speedrun94`` on one GPU, with the real command and images.

Accuracy and seconds are from each run's journal. ``time/train_seconds`` includes batches and steps; it excludes
compilation, graph capture, evaluation and checkpoints. airbench94's published time is 2.59 s on an A100, for 94.01 % on
lossless images. Its recipe reaches 0.897 on the JPEG copy of CIFAR-10, 0.902 with mirrored evaluation. Each recipe is
run with captured steps of PyTorch's kernels and of Inductor's kernels.
"""

import sys

from commands import Workplace, workplace
from harness import Figure, Goal, arguments, publish
from time_to_accuracy import REAL_IMAGES
from workload import ON_GPU

REFERENCE_SECONDS = Goal("<=", 12.0)
SPEEDRUN94_ACCURACY = Goal(">=", 0.897)


def main() -> None:
    options = arguments(__doc__, pairs=3).parse_args()  # a pair is a seed
    if not ON_GPU:
        sys.exit("recipes: there is no GPU; time_to_accuracy.py is for processors")
    rows: list[Figure] = []
    with workplace() as place:
        for compiled in ("auto", "always"):
            rows += figures(place, ["experiment=reference"], compiled, options.pairs, seconds=REFERENCE_SECONDS)
            recipe = ["experiment=speedrun94", "train.mirrored_evaluation=true"]
            rows += figures(place, recipe, compiled, options.pairs, accuracy=SPEEDRUN94_ACCURACY)
    publish("recipes", rows)


def figures(
    place: Workplace,
    recipe: list[str],
    compiled: str,
    seeds: int,
    seconds: Goal | None = None,
    accuracy: Goal | None = None,
) -> list[Figure]:
    """The figures of a recipe: the mean accuracy over seeds and the median seconds."""
    overrides = [*recipe, *REAL_IMAGES, "devices=gpu", "devices.count=1", f"train.compile={compiled}", "tracking=none"]
    runs = [place.run([*overrides, f"seed={seed}"]).metrics for seed in range(seeds)]
    name = f"{recipe[0].removeprefix('experiment=')}, train.compile={compiled}: "

    def values(metric: str) -> list[float]:
        return [run[metric] for run in runs if metric in run]

    rows = [
        Figure.mean_of(f"{name}test accuracy", values("test/accuracy"), goal=accuracy),
        Figure.of(f"{name}training", values("time/train_seconds"), "s", goal=seconds),
        Figure.of(f"{name}compiling and capturing", values("time_split/compile"), "s"),
        Figure.of(f"{name}whole command", values("time/total_seconds"), "s"),
    ]
    if mirrored := values("test/accuracy_mirrored"):
        rows.insert(1, Figure.mean_of(f"{name}test accuracy, mirrored", mirrored))
    return rows


if __name__ == "__main__":
    main()
