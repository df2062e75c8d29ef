"""For every residency, the same (seed, epoch, position) gives the same pixels and label; broken files are named."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from cifar_exp.config.reading import read_config
from cifar_exp.data import cifar10, class_folders, file_source, image_files, image_reader, synthetic
from cifar_exp.data.augment import Shift
from cifar_exp.data.batches import EvaluationBatches, Normalization, TrainBatches, epoch_order
from cifar_exp.data.dataset_files import DatasetFiles, Split
from cifar_exp.data.image_files import ImageFiles
from cifar_exp.data.image_reader import Preprocessing, read_image
from cifar_exp.data.prefetch import prefetched
from cifar_exp.data.sources import HostSource, Source, fetch, open_sources, residency_on
from cifar_exp.distributed.process_group import World
from cifar_exp.errors import ConfigError, DataError, MachineError, StorageError
from cifar_exp.runs.classifier import Classifier
from cifar_exp.runs.components import build
from cifar_exp.runs.config_changes import config_hash
from cifar_exp.training.cuda_graph import CapturedStep
from cifar_exp.training.evaluation import evaluate
from tests.conftest import TINY, Command
from tests.helpers.commands import ForkedCommand
from tests.helpers.configs import composed
from tests.helpers.defaults import with_defaults
from tests.helpers.image_trees import CPU, MIXED, SIDE, tree
from tests.helpers.processes import assert_nothing_is_left, training_ranks

SHIFT = with_defaults(Shift)()
folders = with_defaults(class_folders.folders)


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("equal"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture
def sources(equal: Path) -> Iterator[Callable[..., tuple[Source, Source]]]:
    """``sources("host")``: training and test images of ``equal``."""
    with ExitStack() as closing:

        def make(choice: Any, workers: int = 0, root: Path = equal) -> tuple[Source, Source]:
            size = SIDE if choice == "loader" else None
            files = folders(root, residency=choice, image_size=size, workers=workers)
            return closing.enter_context(open_sources(files, CPU, threads=1))

        yield make


def batches(source: Source, rank: int, world_size: int, batch_size: int = 4) -> TrainBatches:
    return TrainBatches(source, SHIFT, Normalization((120.0, 121.0, 122.0)), 3, rank, world_size, batch_size)


WAYS = [("device", 0), ("host", 0), ("loader", 0), ("loader", 2)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("choice", "workers"), WAYS)
def test_every_residency_gives_the_batches_of_images_in_memory(
    sources: Callable[..., tuple[Source, Source]], equal: Path, choice: str, workers: int, world_size: int
) -> None:
    """Three epochs and an evaluation between them, as in a run; 26 images are 6 or 3 steps, the rest is dropped."""
    memory = folders(equal)
    train, test = sources(choice, workers)
    for rank in range(world_size):
        ours, theirs = (batches(source, rank, world_size) for source in (train, memory.load("train")))
        for epoch in (1, 2, 3):
            torch.manual_seed(7)
            steps = list(ours.epoch(epoch))
            drawn = torch.rand(1)
            torch.manual_seed(7)
            assert torch.equal(drawn, torch.rand(1)), "the network's own random numbers have moved"
            expected = list(theirs.epoch(epoch))
            assert len(steps) == len(expected) == 26 // (4 * world_size)
            for (images, labels), (same_images, same_labels) in zip(steps, expected, strict=True):
                assert torch.equal(images, same_images)
                assert torch.equal(labels, same_labels)
                assert images.is_contiguous(memory_format=torch.channels_last)
            shares = [
                list(EvaluationBatches(source, Normalization(), rank, world_size, 4))
                for source in (test, memory.load("test"))
            ]
            assert [len(part) for part in shares[0]] == [len(part) for part in shares[1]]
            for (images, labels), (same_images, same_labels) in zip(*shares, strict=True):
                assert torch.equal(images, same_images)
                assert torch.equal(labels, same_labels)


@pytest.mark.parametrize(("choice", "workers"), WAYS)
def test_labels_follow_their_images(
    sources: Callable[..., tuple[Source, Source]], equal: Path, choice: str, workers: int
) -> None:
    """Steps side by side are the epoch's order, each image that of the file at its place."""
    paths = sorted((equal / "train").rglob("*.png"))
    source, _ = sources(choice, workers)
    order = epoch_order(26, 5, 1)
    parts = [slice(start, start + 4) for start in range(0, 24, 4)]
    drawn = [source.pick(draw) for draw in source.draws(order, parts)]
    for place, image, label in zip(
        order[:24].tolist(), torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn]), strict=True
    ):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(paths[place])))
        assert label == (paths[place].parent.name == "bee")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("choice", ["device", "host", "loader"])
def test_every_image_is_evaluated_once_wherever_it_lies(
    sources: Callable[..., tuple[Source, Source]],
    choice: str,
    world_size: int,
    only_rank: World,  # noqa: ARG001
) -> None:
    _, test = sources(choice)
    seen: list[Tensor] = []

    class Ants(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    shares = [EvaluationBatches(test, Normalization(), rank, world_size, 2) for rank in range(world_size)]
    averages = [evaluate(Ants(), share, torch.float32) for share in shares]
    assert sum(average.count for average in averages) == 11
    assert round(sum(average.accuracy * average.count for average in averages)) == 6
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 11


@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_other_sizes_are_resized_as_torchvision_does(mixed: Path, workers: int) -> None:
    files = folders(mixed, residency="loader", image_size=SIDE, workers=workers)
    expected = []
    for path in sorted((mixed / "train").rglob("*.png")):
        image = functional.pil_to_tensor(Image.open(path))
        expected.append(functional.center_crop(functional.resize(image, [SIDE], antialias=True), [SIDE, SIDE]))
    with open_sources(files, CPU, threads=1) as (train, test):
        images, labels = fetch(train, torch.arange(26))
        assert len(test) == 11
    assert images.shape == (26, 3, SIDE, SIDE)
    assert torch.equal(images, torch.stack(expected))
    assert labels.tolist() == [0] * 13 + [1] * 13
    assert torch.equal(files.load("train").images, images)
    mean, std = (value(images.double(), (0, 2, 3)) for value in (torch.mean, lambda x, d: x.std(d, correction=0)))
    assert files.mean == pytest.approx(mean.tolist())
    assert files.std == pytest.approx(std.tolist())


def test_unfinished_epoch_does_not_affect_the_next(sources: Callable[..., tuple[Source, Source]], equal: Path) -> None:
    memory = batches(folders(equal).load("train"), 0, 1)
    for choice, workers in WAYS:
        ours = batches(sources(choice, workers)[0], 0, 1)
        draws = ours.micro_batches(1)
        first = next(draws)
        draws.close()  # type: ignore[attr-defined]
        for made in (ours.make(*first), ours.make(*ours.example())):
            assert torch.equal(made[0], next(memory.epoch(1))[0])
        for (images, _), (expected, _) in zip(ours.epoch(2), memory.epoch(2), strict=True):
            assert torch.equal(images, expected)


def test_workers_persist_over_epochs_and_end_with_the_context(equal: Path) -> None:
    me = psutil.Process()
    before = set(me.children())
    files = folders(equal, residency="loader", image_size=SIDE, workers=2)
    with open_sources(files, CPU, threads=1) as (train, test):
        workers = set(me.children()) - before
        assert len(workers) == 2
        for epoch in (1, 2):
            assert len(list(batches(train, 0, 1).epoch(epoch))) == 6
            assert len(fetch(test, torch.arange(11))[1]) == 11
        assert set(me.children()) - before == workers
    assert_nothing_is_left(list(workers))


def test_dead_worker_is_reported_with_a_remedy(equal: Path) -> None:
    files = folders(equal, residency="loader", image_size=SIDE, workers=1)
    before = set(psutil.Process().children())

    def killed() -> None:
        with open_sources(files, CPU, threads=1) as (train, _):
            fetch(train, torch.arange(3))
            for worker in set(psutil.Process().children()) - before:
                worker.kill()
            fetch(train, torch.arange(26))

    with pytest.raises(MachineError, match=r"data\.workers=1: DataLoader worker .*\. Set data\.workers=<fewer>"):
        killed()


@pytest.mark.parametrize("problem", ["No space left on device (28)", "Read-only file system (30)"])
def test_loader_works_without_shared_memory(equal: Path, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    """Containers have little shared memory: the batch would go to a thread that fails, and training would hang."""
    files = folders(equal, residency="loader", image_size=SIDE, workers=1)
    with open_sources(files, CPU, threads=1) as (train, _):
        expected = fetch(train, torch.arange(5))

    def refuse(_: object) -> None:
        raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1_2_0>: {problem}")

    monkeypatch.setattr("torch.UntypedStorage._share_fd_cpu_", refuse)
    monkeypatch.setattr("torch.UntypedStorage.share_memory_", refuse)
    with open_sources(files, CPU, threads=1) as (train, _):
        images, labels = fetch(train, torch.arange(5))
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


def test_failure_to_start_workers_is_reported_with_a_remedy(equal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("os.fork", refuse)
    message = r"data\.workers=1: worker processes cannot be started: Resource temp.*\. Set data\.workers=<fewer>"
    with (
        pytest.raises(MachineError, match=message),
        open_sources(folders(equal, residency="loader", image_size=SIDE, workers=1), CPU, 1),
    ):
        pass


def test_workers_leave_ctrl_c_to_the_parent(equal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal sends Ctrl-C to every process: workers print nothing, and end with their rank."""
    files = folders(equal, residency="loader", image_size=SIDE, workers=1)
    before = set(psutil.Process().children())
    with open_sources(files, CPU, threads=1) as (train, _):
        fetch(train, torch.arange(3))  # the worker has begun
        for worker in set(psutil.Process().children()) - before:
            worker.send_signal(signal.SIGINT)
        assert fetch(train, torch.arange(26))[1].tolist() == [0] * 13 + [1] * 13
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (3, 3), (64, 8)])
def test_auto_workers_is_one_per_thread_and_at_most_eight(
    equal: Path, monkeypatch: pytest.MonkeyPatch, threads: int, expected: int
) -> None:
    asked: list[int] = []

    def noted(*_: Any, num_workers: int, **__: Any) -> Any:
        asked.append(num_workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(file_source, "DataLoader", noted)
    files = folders(equal, residency="loader", image_size=SIDE)
    with pytest.raises(KeyboardInterrupt), open_sources(files, CPU, threads):
        pass
    assert asked == [expected]


@pytest.mark.parametrize("workers", [0, 1])
def test_file_damaged_during_training_is_a_data_error_with_its_path(tmp_path: Path, workers: int) -> None:
    files = folders(tree(tmp_path), residency="loader", image_size=SIDE, workers=workers)
    (tmp_path / "train" / "bee" / "03.png").write_bytes(b"no image")
    (tmp_path / "test" / "ant" / "02.png").unlink()
    with open_sources(files, CPU, threads=1) as (train, test):
        with pytest.raises(DataError, match=r"train/bee/03\.png: is not an image in a known format\. Replace"):
            list(batches(train, 0, 1, batch_size=13).micro_batches(1))
        with pytest.raises(DataError, match=r"test/ant/02\.png: .*No such file"):
            fetch(test, torch.arange(11))
        assert fetch(test, torch.arange(2))[1].tolist() == [0, 0]


def test_a_broken_file_of_the_sample_is_found_before_anything_starts(tmp_path: Path) -> None:
    (tree(tmp_path) / "train" / "bee" / "03.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"train/bee/03\.png: is empty"):
        folders(tmp_path, residency="loader", image_size=SIDE)
    assert [path.name for path in (tmp_path / ".cache").iterdir()] == [".lock"]


def test_statistics_are_computed_once_and_the_hash_follows_files_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = folders(tree(tmp_path), residency="loader", image_size=SIDE)
    assert isinstance(first, ImageFiles)
    assert (first.train_count, first.test_count, first.image_size) == (26, 11, (SIDE, SIDE))
    assert first.classes == ("ant", "bee")
    with monkeypatch.context() as patch:
        patch.setattr(image_reader, "decode_image", lambda *_: pytest.fail("a file was read again"))
        assert folders(tmp_path, residency="loader", image_size=SIDE) == first
    assert folders(tmp_path, residency="loader", image_size=SIDE + 1).content_hash != first.content_hash
    os.utime(tmp_path / "test" / "bee" / "01.png", ns=(1, 1))
    assert folders(tmp_path, residency="loader", image_size=SIDE).content_hash != first.content_hash
    (first.folder / "train_files.npy").unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        first.load("train")


def test_statistics_are_those_of_a_sample_where_there_are_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "SAMPLE", 5)
    read: list[Path] = []
    original = image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda path, size: (read.append(path), original(path, size))[1])
    files = folders(tree(tmp_path), residency="loader", image_size=SIDE)
    assert len(set(read)) == len(read) == 5
    pixels = np.stack([np.asarray(Image.open(path)) for path in read])
    assert files.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)).tolist())


REFUSED: dict[str, tuple[str, ...]] = {
    "data=cifar10 data.residency=loader": ("data.residency=loader", "auto, device or host", "Set data.residency="),
    "data=synthetic data.residency=loader": ("data.residency=loader", "auto, device or host", "Set data.residency="),
    "data=folders data.residency=disk": ("data.residency=disk", "loader", "Set data.residency="),
    "data=folders data.workers=-1": ("data.workers=-1", "0 or more or auto", "Set data.workers=0"),
    "data=folders data.image_size=0": ("data.image_size=0", "1 or more", "Set data.image_size=1"),
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_invalid_settings_are_refused_with_value_rule_and_remedy(overrides: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(read_config(composed(*overrides.split())))
    for part in REFUSED[overrides]:
        assert part in str(refusal.value)


def test_the_loader_is_for_folders_alone_and_needs_a_size(tmp_path: Path, equal: Path) -> None:
    for source in map(with_defaults, (cifar10.cifar10, synthetic.synthetic)):
        with pytest.raises(ConfigError, match=r"data\.residency=loader: .* only data=folders .* Set data\.residency="):
            source(tmp_path, residency="loader")
    with pytest.raises(ConfigError, match=r"data\.image_size=null: .* Set data\.image_size=<"):
        folders(equal, residency="loader")
    assert folders(equal, residency="host", image_size=SIDE).residency == "host"
    assert not list(tmp_path.iterdir())


def test_images_too_large_for_memory_suggest_the_loader(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"all images must have one size[^$]*data\.residency=loader data\.image_size="):
        folders(mixed)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StorageError, match=r"No space left.*data\.residency=loader data\.image_size=<n>"):
        folders(tree(tmp_path))


@pytest.mark.parametrize(
    ("kind", "choice", "expected"),
    [
        ("cuda", "auto", "host"),
        ("cuda", "device", "device"),
        ("cuda", "host", "host"),
        ("cpu", "auto", "device"),
        ("cpu", "host", "host"),
    ],
)
def test_auto_residency_is_device_if_images_take_at_most_half_of_its_free_memory(
    monkeypatch: pytest.MonkeyPatch, kind: str, choice: Any, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 8000))
    assert residency_on(torch.device(kind), choice, 501) == expected
    assert residency_on(torch.device(kind), choice, 500) == ("device" if choice == "auto" else expected)


def test_run_resumes_with_another_residency() -> None:
    first, moved, resized = (
        config_hash(read_config(composed("data=folders", *more)))
        for more in ((), ("data.residency=host", "data.workers=2"), ("data.image_size=32",))
    )
    assert moved == first != resized


def test_custom_dataset_needs_no_residency_parameter(equal: Path) -> None:
    known = {name: value for name, value in vars(folders(equal)).items() if name != "residency"}
    files = DatasetFiles(**known)
    assert files.residency == "auto"
    with open_sources(files, CPU, threads=1) as (train, _):
        assert isinstance(train, Split)


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_thread_ends_with_an_unfinished_epoch(sources: Callable[..., tuple[Source, Source]]) -> None:
    source, _ = sources("host")
    assert isinstance(source, HostSource)
    draws = batches(source, 0, 1, batch_size=1).micro_batches(1)
    next(draws)
    assert len(prefetching()) == 1
    draws.close()  # type: ignore[attr-defined]
    assert prefetching() == []
    list(batches(source, 0, 1).micro_batches(1))
    assert prefetching() == []


def test_prefetching_is_limited_to_the_given_depth() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    stream = prefetched(items(), 3)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(made) == 5  # one taken, three waiting, one in hand
    assert list(stream) == list(range(1, 100))
    assert prefetching() == []


def test_error_of_the_prefetch_thread_comes_after_its_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("the second one")

    stream = prefetched(items(), 3)
    assert next(stream) == 1
    with pytest.raises(DataError, match="the second one"):
        next(stream)
    assert prefetching() == []


def test_start_function_runs_in_the_prefetch_thread() -> None:
    names: list[str] = []
    assert list(prefetched([1, 2], 1, lambda: names.append(threading.current_thread().name))) == [1, 2]
    assert names == ["prefetch"]


def test_captured_step_uses_the_random_draws_of_every_source(sources: Callable[..., tuple[Source, Source]]) -> None:
    for choice in ("device", "host", "loader"):
        ours = batches(sources(choice)[0], 0, 1)
        seen: list[Tensor] = []

        def compute(*draw: Tensor, ours: TrainBatches = ours, seen: list[Tensor] = seen) -> None:
            seen.append(ours.make(*draw)[0])

        step = CapturedStep(compute, ours.example(), lambda function: function)
        for draw in ours.micro_batches(2):
            step(*draw)
        for images, (expected, _) in zip(seen, ours.epoch(2), strict=True):
            assert torch.equal(images, expected)


LOADER = [
    *[override for override in TINY if not override.startswith("data")],
    *("data=folders", "data.root=images", "data.residency=loader", f"data.image_size={SIDE}", "data.workers=1"),
    *("train.batch_size=4", "devices.count=2", "tracking=none"),
]


def processes_in(folder: Path) -> list[psutil.Process]:
    """Those that were started there, workers included, but for this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended meanwhile
            if process.cwd() == str(folder) and process.pid != os.getpid():
                found.append(process)
    return found


def test_run_trains_on_files_of_several_sizes(cifar_exp: Command, workplace: Path) -> None:
    tree(workplace / "images", MIXED)
    done = cifar_exp(*LOADER, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "on 11 images" in done.stdout
    assert done.stderr == ""
    psutil.wait_procs(processes_in(workplace), timeout=2)
    assert processes_in(workplace) == []


def test_damaged_file_found_by_a_rank_is_exit_code_3(cifar_exp: Command, workplace: Path) -> None:
    """A test image, because the sample for the statistics has training images only."""
    (tree(workplace / "images", MIXED) / "test" / "bee" / "04.png").write_bytes(b"no image")
    done = cifar_exp(*LOADER, "progress=quiet")
    assert done.returncode == 3
    assert f"{workplace}/images/test/bee/04.png: is not an image in a known format" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_end_with_a_rank_that_is_killed(started: Callable[..., ForkedCommand], workplace: Path) -> None:
    tree(workplace / "images", MIXED)
    process = started(*LOADER, "train.epochs=100000", "progress=quiet")
    ranks = training_ranks(process, workplace)
    workers = [worker for rank in ranks for worker in rank.children()]
    assert len(workers) == 2
    ranks[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "rank 0 died without an error" in errors
    assert_nothing_is_left([*ranks, *workers])


def test_prediction_reads_an_image_as_training_does(mixed: Path) -> None:
    files = folders(mixed, residency="loader", image_size=SIDE, workers=0)
    classifier = Classifier(torch.nn.Identity(), files.classes, Normalization(), files.preprocessing, files.image_size)
    paths = sorted((mixed / "test" / "ant").iterdir())
    predicted = torch.stack([classifier.read(path) for path in paths])
    assert torch.equal(predicted, files.load("test").images[: len(paths)])


@pytest.mark.parametrize(("shape", "size"), [((20, 40), (10, 10)), ((40, 20), (10, 15)), ((7, 9), (14, 18))])
def test_a_read_image_covers_the_size_and_keeps_its_centre(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[shape[0] // 2 - 2 : shape[0] // 2 + 2, shape[1] // 2 - 2 : shape[1] // 2 + 2] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", Preprocessing(size))
    assert isinstance(image, torch.Tensor)
    assert image.shape == (3, *size)
    assert image[:, size[0] // 2, size[1] // 2].min() > 128
