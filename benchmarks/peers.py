"""Training and evaluation of a fixed part of an epoch: ours against Lightning, accelerate and plain PyTorch.

All of them train the reference network with SGD at batch 256 from the same uint8 arrays in memory, with flips and
whole-pixel shifts. They then evaluate a fifth as many images, and record loss and accuracy. Checkpoints, loggers and
progress bars are off, and start-up is not measured. ``tuned`` has the usual options for this hardware: native bfloat16,
channels-last, persistent DataLoader workers (``--workers``), and torch.compile on a GPU. On a GPU all of them have
pinned batches, cuDNN's fastest algorithms and a fused optimizer.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bare import bare_step
from harness import Goal, arguments, compare_all, publish
from processes import ProcessArm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from vision import loader
from workload import (
    BATCH,
    CORES,
    DEVICE,
    ON_GPU,
    PRECISION,
    alone,
    evaluation_batches,
    network,
    prepare,
    random_split,
    synchronize,
    train_batches,
    trainer,
)

EVALUATION_BATCH = 500  # images, as ours
TUNED = Goal("<=", 1 / 5 if ON_GPU else 1 / 1.3)
AHEAD = Goal("<=", 1.0)


def main() -> None:
    parser = arguments(__doc__, pairs=4)
    images, workers = (25_600, max(1, CORES // 2)) if ON_GPU else (5_120, 1)
    parser.add_argument("--images", type=int, default=images, help=f"training images a turn (default: {images:,})")
    told = f"DataLoader workers of the tuned peers (default: {workers})"
    parser.add_argument("--workers", type=int, default=workers, help=told)
    parser.add_argument("--only", nargs="+", choices=("lightning", "accelerate", "plain"), help="leave others out")
    options = parser.parse_args()
    peers: dict[str, tuple[Callable[..., None], tuple[Any, ...], Goal]] = {
        "lightning, default": (lightning_epochs, (options.images, 0, False), AHEAD),
        "lightning, tuned": (lightning_epochs, (options.images, options.workers, True), TUNED),
        "accelerate, tuned": (accelerate_epochs, (options.images, options.workers), TUNED),
        "plain PyTorch, fp32": (plain_epochs, (options.images,), AHEAD),
    }
    chosen = {name: peer for name, peer in peers.items() if not options.only or name.startswith(tuple(options.only))}
    with ExitStack() as stack:
        ours = stack.enter_context(ProcessArm(our_epochs, options.images, threads=CORES))
        arms = {
            f"ours / {name}": stack.enter_context(ProcessArm(function, *args, threads=CORES))
            for name, (function, args, _) in chosen.items()
        }
        goals = {f"ours / {name}": goal for name, (*_, goal) in chosen.items()}
        rows = compare_all(ours, arms, options.pairs, goals)
    rates = {row.name: [round(options.images / seconds) for seconds in row.seconds] for row in rows}
    publish("peers", rows, {"training images a turn": options.images, "images/s of each": rates})


def our_epochs(turns: Iterator[None], folder: str, images: int) -> None:
    with alone(Path(folder)) as world:
        loop = trainer(world)
        training = train_batches(random_split(images), world)
        test = evaluation_batches(random_split(images // 5), world)
        prepare(loop, training)
        for epoch, _ in enumerate(turns, 1):  # training continues with the next epoch
            loop.fit(training, test, epochs=epoch)


def plain_epochs(turns: Iterator[None], _folder: str, images: int) -> None:
    """The loop of PyTorch's tutorials: float32, the default memory format, no DataLoader workers."""
    model, optimizer = network()
    model = model.to(memory_format=torch.contiguous_format)
    training = loader(random_split(images), BATCH, training=True)
    test = loader(random_split(images // 5), EVALUATION_BATCH, training=False)
    for _ in turns:
        model.train()
        for batch_images, labels in training:
            bare_step(model, optimizer, batch_images.to(DEVICE), labels.to(DEVICE), torch.float32).item()
        model.eval()
        correct = 0
        with torch.no_grad():
            for batch_images, labels in test:
                correct += int((model(batch_images.to(DEVICE)).argmax(1) == labels.to(DEVICE)).sum().item())


def accelerate_epochs(turns: Iterator[None], _folder: str, images: int, workers: int) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=not ON_GPU,
        mixed_precision="bf16" if torch.bfloat16 == PRECISION else "no",
        dataloader_config=DataLoaderConfiguration(non_blocking=ON_GPU),
    )
    model, optimizer = network()
    if ON_GPU:
        model.compile()
    model, optimizer, training, test = accelerator.prepare(
        model,
        optimizer,
        loader(random_split(images), BATCH, training=True, workers=workers),
        loader(random_split(images // 5), EVALUATION_BATCH, training=False, workers=workers),
    )
    for _ in turns:
        model.train()
        for batch_images, labels in training:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(channels_last(batch_images)), labels)
            accelerator.backward(loss)
            optimizer.step()
        model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=DEVICE)
        with torch.inference_mode():
            for batch_images, labels in test:
                logits = model(channels_last(batch_images))
                correct += accelerator.gather_for_metrics(logits.argmax(1) == labels).sum()
        correct.item()


def channels_last(images: Tensor) -> Tensor:
    return images.to(memory_format=torch.channels_last)


def lightning_epochs(turns: Iterator[None], folder: str, images: int, workers: int, tuned: bool) -> None:
    import lightning

    warnings.filterwarnings("ignore")  # of few workers, and of a step that logs nothing
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    mixed = {"precision": "bf16-mixed"} if tuned and torch.bfloat16 == PRECISION else {}
    lightning.Trainer(
        accelerator="gpu" if ON_GPU else "cpu",
        devices=1,
        max_epochs=-1,
        num_sanity_val_steps=0,
        callbacks=[_each_epoch_a_turn(turns)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **mixed,
    ).fit(
        _lightning_module(tuned),
        loader(random_split(images), BATCH, training=True, workers=workers),
        loader(random_split(images // 5), EVALUATION_BATCH, training=False, workers=workers),
    )


def _each_epoch_a_turn(turns: Iterator[None]) -> Any:
    import lightning

    class EachEpochATurn(lightning.Callback):
        """A turn is the time between the ends of two epochs, including validation and Lightning's own work."""

        def on_fit_start(self, *_: object) -> None:
            next(turns)

        def on_train_epoch_end(self, *_: object) -> None:  # after the epoch's validation
            synchronize()
            next(turns)

    return EachEpochATurn()


def _lightning_module(tuned: bool) -> Any:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: nn.Module = network()[0]
            if not tuned:
                self.model = self.model.to(memory_format=torch.contiguous_format)
            elif ON_GPU:
                self.model.compile()

        def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
            loss = F.cross_entropy(self.logits(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
            self.log("val/accuracy", (self.logits(batch[0]).argmax(1) == batch[1]).float().mean())

        def logits(self, images: Tensor) -> Tensor:
            return self.model(channels_last(images) if tuned else images)

        def configure_optimizers(self) -> Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-10, fused=ON_GPU)

    return Classifier()


if __name__ == "__main__":
    main()
