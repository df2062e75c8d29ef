"""A minimal script that launches one rank with torch elastic and takes one training step, for `startup.py`."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F

BATCH = 256


def convnet(width: int = 32, depth: int = 4) -> nn.Sequential:
    """The reference network."""
    layers: list[nn.Module] = []
    channels = 3
    for block in range(3):
        for _ in range(depth):
            out_channels = width << block
            layers += [nn.Conv2d(channels, out_channels, 3, padding="same"), nn.BatchNorm2d(out_channels), nn.ReLU()]
            channels = out_channels
        if block < 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def train_one_step(folder: str, done: str, threads: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(threads)
    images, labels = (
        torch.from_numpy(np.array(np.load(Path(folder) / f"train_{name}.npy", mmap_mode="r")[:BATCH]))
        for name in ("images", "labels")
    )
    model = convnet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = images.permute(0, 3, 1, 2).float() - 120.0  # the file is channels-last
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(inputs).float(), labels)
    loss.backward()
    optimizer.step()
    Path(done).write_text(f"{loss.item()}\n")
    dist.destroy_process_group()


def main() -> None:
    folder, done, threads = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=1, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", run_id="bare"
    )
    elastic_launch(config, train_one_step)(folder, done, int(threads))


if __name__ == "__main__":
    main()
