"""Our training loop against a bare PyTorch loop that does the same step on the same batches."""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from harness import compare, publish
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_exp.array_cache import Split
from cifar_exp.augment import Shift
from cifar_exp.data import Normalization, TrainBatches
from cifar_exp.distributed import ExposedCommunication, joined_world
from cifar_exp.models import convnet, seeded
from cifar_exp.train import Trainer

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    arguments = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with tempfile.TemporaryDirectory() as folder, joined_world("cpu", Path(folder), 600):
        publish("overhead", [compare("our fit / bare loop, 10 steps", ours(), bare(), arguments.pairs)])


def batches() -> TrainBatches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256 * STEPS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (256 * STEPS,), generator=generator)
    normalization = Normalization.of("zerocenter", (125.0, 123.0, 114.0), (63.0, 62.0, 66.0))
    return TrainBatches(Split(images, labels), Shift(), normalization, 0, 0, 1, 256)


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = seeded(convnet, 10, 0).to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-10)


def ours():
    model, optimizer = network()
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        learning_rates=(0.01,) * 100_000,
        precision=torch.bfloat16,
        label_smoothing=0.0,
        log_every=STEPS,
        report=lambda *_: None,
        communication=ExposedCommunication(),
    )
    source = batches()
    return lambda: trainer.train_one_epoch(1, source)


def bare():
    model, optimizer = network()
    source = batches()

    def epoch() -> None:
        model.train()
        for images, labels in source.epoch(1):
            loss = step(images, labels)
        loss.item()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return epoch


if __name__ == "__main__":
    main()
