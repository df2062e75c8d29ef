"""Start-up time, until the end of the first training step: ours against a bare elastic launch of the same step.

Ours is `cifar-exp` with MLflow: command line, checks, plan, ranks, images, network, and one step of 256 images on one
rank with all cores. The other (`bare_launch.py`) imports torch, launches one rank with torch elastic, reads a batch of
the same decoded images, builds the same network and takes the same step. Caches are warm. Both times end when the
step's line is in a file; the end of the processes is not measured.
"""

import sys
from pathlib import Path

from commands import Workplace, synthetic_data, workplace
from harness import Goal, arguments, compare, publish
from workload import BATCH, CORES

from cifar_exp.records import journal


def main() -> None:
    options = arguments(__doc__, pairs=8).parse_args()
    with workplace() as place:
        settings = [
            *synthetic_data(place.folder, BATCH, test_count=10),
            "devices=cpu",
            "augment=none",
            "train.epochs=1",
            "train.log_every=1",
        ]
        place.run(settings)  # decodes the images, makes MLflow's store
        images = next(place.folder.glob("synthetic/*/train_images.npy")).parent
        rows = [
            compare(
                "cifar-exp / bare elastic launch, to the first step",
                lambda: seconds_to_our_step(place, settings),
                lambda: seconds_to_bare_step(place, images),
                options.pairs,
                Goal("<=", 1.10),
            )
        ]
    publish("startup", rows)


def seconds_to_our_step(place: Workplace, settings: list[str]) -> float:
    run_dir = place.folder / "runs" / str(place.runs + 1)
    lines = journal.JournalReader(run_dir)
    return place.seconds_until(
        lambda: place.start(settings, "lines")[0], lambda: any(entry.step >= 1 for entry in lines.new_entries())
    )


def seconds_to_bare_step(place: Workplace, images: Path) -> float:
    place.runs += 1
    done = place.folder / f"bare-{place.runs}"
    script = Path(__file__).with_name("bare_launch.py")
    command = [sys.executable, str(script), str(images), str(done), str(CORES)]
    return place.seconds_until(lambda: place.popen(command), done.exists)


if __name__ == "__main__":
    main()
