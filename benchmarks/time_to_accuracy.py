"""Test accuracy and training time of experiment=speedrun against 60 epochs of the reference recipe in a plain loop.

There is one run per seed. Accuracy and seconds are those of its journal: ``time/train_seconds`` is the time to load
batches and take steps. ``time/total_seconds`` is the whole command, with start-up, evaluation and saving.

The plain PyTorch loop (bfloat16, channels-last, one process, whole-pixel shifts) reaches a test accuracy of 0.867 after
60 epochs on the JPEG copy of CIFAR-10. They take 48 to 60 minutes. So its throughput is measured over a few steps after
each run and extrapolated to 60 epochs, without evaluation or start-up.

FLOPs: PyTorch's flop count of forward and backward for one image at each epoch's image size, times the number of images
trained on.
"""

import os
import time
from dataclasses import dataclass
from statistics import mean, median

import torch
from bare import bare_epoch
from commands import REPOSITORY, Run, Workplace, workplace
from harness import Figure, Goal, LoadMeter, arguments, publish
from omegaconf import DictConfig, OmegaConf
from workload import BATCH, CORES, network, random_split, train_batches, training_flop

from cifar_exp.config.reading import read_config
from cifar_exp.data.batches import scaled_size
from cifar_exp.distributed.process_group import World
from cifar_exp.records import journal
from cifar_exp.runs.components import build
from cifar_exp.training.plan import spread

ACCURACY = 0.867
PLAIN_IMAGES = 60 * (50_000 // BATCH) * BATCH  # that the plain loop trains on
IMAGES = REPOSITORY / os.environ.get("CIFAR_EXP_IMAGES", "data/cifar10-images")
REAL_IMAGES = ["data=folders", f"data.root={IMAGES}"]


@dataclass(frozen=True)
class Attempt:
    """One seed's run, and the throughput of the plain loop after it.

    Attributes:
        seed: of the run.
        accuracy: on the test images, 0 to 1.
        train_seconds: time to load batches and take steps.
        total_seconds: the whole command.
        petaflop: multiplications and additions of training, in 10^15.
        plain_images_per_second: of the plain loop, right after the run.
        other_load: share of all cores that other processes took meanwhile.
    """

    seed: int
    accuracy: float
    train_seconds: float
    total_seconds: float
    petaflop: float
    plain_images_per_second: float
    other_load: float

    @property
    def plain_seconds(self) -> float:
        """Extrapolated training time of 60 epochs of the plain loop."""
        return PLAIN_IMAGES / self.plain_images_per_second


def main() -> None:
    parser = arguments(__doc__, pairs=3, steps=20)  # a pair is a seed
    overrides = ["experiment=speedrun", *REAL_IMAGES]
    parser.add_argument("--overrides", nargs="+", default=overrides, help="other runs than experiment=speedrun")
    options = parser.parse_args()
    torch.set_num_threads(CORES)
    with workplace() as place:
        attempts = [attempt(place, options.overrides, seed, options.steps) for seed in range(options.pairs)]
    told = [word for word in options.overrides if not word.startswith("data.root=")]  # a path of this machine
    publish(
        "time_to_accuracy",
        figures(attempts),
        {"overrides": " ".join(told), "seeds": [vars(one) for one in attempts]},
    )


def attempt(place: Workplace, overrides: list[str], seed: int, plain_steps: int) -> Attempt:
    meter = LoadMeter()
    run = place.run([*overrides, f"seed={seed}"])
    metrics = run.metrics
    rate = plain_rate(plain_steps)
    return Attempt(
        seed,
        metrics["test/accuracy"],
        metrics["time/train_seconds"],
        metrics["time/total_seconds"],
        flop_per_image(run) * images_trained(run) / 1e15,
        rate,
        meter.other_load(),
    )


def figures(attempts: list[Attempt]) -> list[Figure]:
    load = median(one.other_load for one in attempts)
    ratios = [one.train_seconds / one.plain_seconds for one in attempts]
    return [
        Figure.mean_of("test accuracy, mean", [one.accuracy for one in attempts], "", Goal(">=", ACCURACY)),
        Figure.of("training", [one.train_seconds for one in attempts], "s", load),
        Figure.of("whole command", [one.total_seconds for one in attempts], "s"),
        Figure.of("arithmetic of training", [one.petaflop for one in attempts], "PFLOP"),
        Figure.of("plain loop", [one.plain_images_per_second for one in attempts], "images/s"),
        Figure.of("training / plain loop's 60 epochs", ratios, "", load, Goal("<=", 1 / 30)),
    ]


def plain_rate(steps: int) -> float:
    """Throughput (images/s) of the plain loop on the reference network, after one unmeasured step."""
    world = World(0, 1, torch.device("cpu"))
    model, optimizer = network()
    first, rest = (train_batches(random_split(BATCH * count), world) for count in (1, steps))
    bare_epoch(model, optimizer, lambda: first.epoch(1))()
    began = time.perf_counter()
    bare_epoch(model, optimizer, lambda: rest.epoch(1))()
    return steps * BATCH / (time.perf_counter() - began)


def flop_per_image(run: Run) -> float:
    """Forward and backward of the run's own network for one image, as the mean over epochs of their image sizes."""
    config = OmegaConf.load(run.folder / "config.yaml")
    assert isinstance(config, DictConfig)
    settings = read_config(config)
    model = build(settings).make_model(num_classes=10)
    scales = spread(settings.train.image_scales or (1.0,), settings.train.epochs)
    return mean(training_flop(model, scaled_size((32, 32), scale)) for scale in scales)


def images_trained(run: Run) -> float:
    """Steps of the run times its global batch."""
    return max(entry.step for entry in journal.read(run.folder)) * run.metrics["global_batch_size"]


if __name__ == "__main__":
    main()
