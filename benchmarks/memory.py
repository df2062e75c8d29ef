"""Memory of ranks: its size, whether ranks share the images, and whether it grows with the epochs.

On CPUs another process observes the ranks while the real command trains on synthetic images. Memory is the proportional
set size (PSS): a page that two processes share counts half in each. Growth is the kernel's peak of resident memory in
the last epoch minus that in the second epoch. Linux only.

On a GPU memory is that reserved by torch's allocator after each epoch of the package's loop, including the captured
step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import psutil
import torch
from commands import Workplace, finish, synthetic_data, workplace
from harness import Figure, Goal, arguments, publish
from processes import ProcessArm
from workload import CORES, ON_GPU, alone, epoch_of, random_split, train_batches, trainer

from cifar_exp.records import journal

MIB = 2**20
IMAGES_FILE = "train_images.npy"
TAKEN_FILE = "taken"  # one line an epoch, bytes
GONE = (psutil.Error, OSError)  # a process may end while it is looked at


@dataclass
class Seen:
    """The observed memory of one run's ranks.

    Attributes:
        peak: largest sum of the ranks' PSS, bytes.
        images: largest sum of the PSS of the training images that they map, bytes.
    """

    peak: int = 0
    images: int = 0


def main() -> None:
    parser = arguments(__doc__, pairs=3)
    parser.add_argument("--epochs", type=int, default=12, help="of the runs that growth is seen in (default: 12)")
    parser.add_argument("--images", type=int, default=5_120, help="training images (default: 5,120)")
    parser.add_argument("--model", default="convnet", help="network of the runs on one and two ranks")
    options = parser.parse_args()
    if ON_GPU:
        taken = [taken_on_a_gpu(options.epochs, options.images) for _ in range(options.pairs)]
        publish("memory", gpu_figures(taken, options.epochs))
        return
    with workplace() as place:
        data = [*synthetic_data(place.folder, options.images), "devices=cpu", "tracking=none", "augment=crop"]
        short = [*data, f"model={options.model}", "train.epochs=1"]
        place.run([*data, "model=convnet_small", "train.epochs=1"])  # makes the images
        one, two = ([watched(place, [*short, *ranks(n)]) for _ in range(options.pairs)] for n in (1, 2))
        long = [*data, "model=convnet_small", f"train.epochs={options.epochs}", *ranks(1)]
        peaks = [epoch_peaks(place, long) for _ in range(options.pairs)]
    notes = {
        "images on disk, MiB": round(options.images * 3 * 32 * 32 / MIB, 1),
        "peak of each epoch, MiB": [[round(peak / MIB, 1) for peak in run] for run in peaks],
    }
    publish("memory", figures(one, two, peaks, options.epochs), notes)


def ranks(count: int) -> list[str]:
    return [f"devices.count={count}", "devices.threads=1", "devices.oversubscribe=true"]


def mib(name: str, values: list[int], goal: Goal | None = None) -> Figure:
    return Figure.of(name, [value / MIB for value in values], "MiB", goal=goal)


def figures(one: list[Seen], two: list[Seen], peaks: list[list[int]], epochs: int) -> list[Figure]:
    shares = [both.images / alone.images for both, alone in zip(two, one, strict=True)]
    return [
        mib("one rank", [seen.peak for seen in one]),
        mib("two ranks together", [seen.peak for seen in two]),
        mib("images in one rank", [seen.images for seen in one]),
        mib("images in two ranks together", [seen.images for seen in two]),
        Figure.of("images in two ranks / in one", shares, goal=Goal("<=", 1.01)),
        mib(f"growth from epoch 2 to {epochs}", [run[-1] - run[1] for run in peaks], Goal("<=", 1.0)),
    ]


def gpu_figures(taken: list[list[int]], epochs: int) -> list[Figure]:
    return [
        mib("one rank", [max(run) for run in taken]),
        mib(f"growth from epoch 2 to {epochs}", [run[-1] - run[1] for run in taken], Goal("<=", 0.0)),
    ]


def taken_on_a_gpu(epochs: int, images: int) -> list[int]:
    """Bytes that a rank with captured steps has reserved on the GPU after each epoch."""
    with ProcessArm(gpu_rank, images, threads=CORES) as arm:
        for _ in range(epochs):
            arm()
        (folder,) = arm.folders
        return [int(line) for line in (folder / TAKEN_FILE).read_text().split()]


def gpu_rank(turns: Iterator[None], folder: str, images: int) -> None:
    with alone(Path(folder)) as world:
        epoch = epoch_of(trainer(world), train_batches(random_split(images), world))
        torch.cuda.empty_cache()  # what preparing took and gave back
        for _ in turns:
            epoch()
            with (Path(folder) / TAKEN_FILE).open("a") as file:
                file.write(f"{torch.cuda.memory_reserved()}\n")


def watched(place: Workplace, overrides: list[str]) -> Seen:
    """Run the command and read the memory of its ranks ten times a second."""
    process, _ = place.start(overrides)
    seen = Seen()
    while process.poll() is None:
        found = ranks_of(process)
        seen.peak = max(seen.peak, total(found, pss))
        seen.images = max(seen.images, total(found, images_pss))
        time.sleep(0.1)
    finish(process)
    return seen


def epoch_peaks(place: Workplace, overrides: list[str]) -> list[int]:
    """Run the command on one rank. Returns its peak of resident memory in bytes for each observed epoch."""
    process, run_dir = place.start(overrides)
    lines = journal.JournalReader(run_dir)
    found: list[int] = []
    peaks: list[int] = []
    while process.poll() is None:
        found = found or ranks_of(process)
        ended = sum("val/loss" in entry.metrics for entry in lines.new_entries())
        if ended and (peak := total(found, peak_since_last)):  # the rank may have ended with its last epoch
            peaks.append(peak)
        time.sleep(0.01)
    finish(process)
    return peaks


def ranks_of(command: "Popen[str]") -> list[int]:
    """The ranks: those processes of the command that have mapped the training images."""
    found = []
    with suppress(*GONE):
        for child in psutil.Process(command.pid).children(recursive=True):
            with suppress(*GONE):
                if IMAGES_FILE in Path(f"/proc/{child.pid}/maps").read_text():
                    found.append(child.pid)
    return found


def total(processes: list[int], measure: Callable[[int], int]) -> int:
    """The sum of ``measure`` over the processes that still run."""
    bytes_of = 0
    for process in processes:
        with suppress(*GONE):
            bytes_of += measure(process)
    return bytes_of


def pss(process: int) -> int:
    return _field(Path(f"/proc/{process}/smaps_rollup").read_text(), "Pss:")


def images_pss(process: int) -> int:
    """PSS of the mapped training images alone."""
    mappings = Path(f"/proc/{process}/smaps").read_text()
    return sum(_field(part, "Pss:") for part in mappings.split(IMAGES_FILE)[1:])


def peak_since_last(process: int) -> int:
    """Peak of resident memory since the last call. The kernel's peak is then reset to the current value."""
    peak = _field(Path(f"/proc/{process}/status").read_text(), "VmHWM:")
    Path(f"/proc/{process}/clear_refs").write_text("5")  # resets the peak alone (Linux' proc(5))
    return peak


def _field(text: str, name: str) -> int:
    """The first figure of that name, given in kB, in bytes."""
    return int(text.partition(name)[2].split(maxsplit=1)[0]) * 1024


if __name__ == "__main__":
    main()
