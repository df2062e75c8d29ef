"""A performance model of the reference recipe on 1, 2, 4 and 8 GPUs of one host. Nothing here is measured.

The time of a step is computation plus exposed communication (the part of the all-reduce that the backward pass does not
overlap). All assumptions are constants in this file: `python benchmarks/gpu_model.py` prints the table.
"""

from dataclasses import dataclass

IMAGES = 50_000
PARAMETERS = 677_610
GRADIENT_BYTES = 4 * PARAMETERS  # float32, 2.7 MB
FIRST_BUCKET_BYTES = 1024 * 1024  # DDP's default; the rest, below 25 MiB, is its second bucket
GPUS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Computing:
    """The computation time of one GPU.

    Attributes:
        name: how the step is executed.
        ms_per_256: milliseconds for 256 images if the hardware is the limit.
        floor_ms: the least milliseconds of a step with any number of images, for launching kernels.
    """

    name: str
    ms_per_256: float
    floor_ms: float

    def ms(self, images: float) -> float:
        """Forward, backward and update of ``images`` on one GPU."""
        return max(self.ms_per_256 * images / 256, self.floor_ms)


# 0.37 ms: bytes that a fused step must move, at the 4.3 TB/s that an H200 copied; a bound, nobody has reached it.
# 0.12 ms: some 60 kernels of a captured graph at 2 us each (assumed). 2 ms: eager, within the 1.5 to 3 ms expected.
FUSED = Computing("fused, one CUDA graph", 0.37, 0.12)
EAGER = Computing("eager", 0.37, 2.0)


@dataclass(frozen=True)
class Network:
    """NCCL's all-reduce over NVLink; all three are assumptions.

    Attributes:
        latency_us: microseconds of a collective on two GPUs, including its launch.
        hop_us: additional microseconds for each further step around the ring.
        bandwidth_gb: GB/s that a GPU sends for messages of one or two megabytes, far below the link's bandwidth.
    """

    latency_us: float = 15.0
    hop_us: float = 1.5
    bandwidth_gb: float = 120.0

    def ms(self, size: float, gpus: int) -> float:
        """A ring: each GPU sends 2 (n - 1) / n of the message in 2 (n - 1) steps."""
        if gpus == 1:
            return 0.0
        hops = 2 * (gpus - 1)
        sending = size * hops / gpus / (self.bandwidth_gb * 1e9) * 1e3
        return (self.latency_us + self.hop_us * (hops - 2)) / 1e3 + sending


@dataclass(frozen=True)
class Step:
    """The modelled times of one step, in milliseconds."""

    computing: float
    all_reduce: float
    exposed: float

    @property
    def ms(self) -> float:
        """All of it."""
        return self.computing + self.exposed


def step(computing: Computing, network: Network, gpus: int, images: float) -> Step:
    """DDP with two buckets: the first overlaps with the backward pass, the second is sent after it.

    The backward pass is two thirds of a step, and its last layers fill the first bucket in a fifth of that (both
    assumed).
    """
    seconds = computing.ms(images)
    first = network.ms(FIRST_BUCKET_BYTES, gpus)
    second = network.ms(GRADIENT_BYTES - FIRST_BUCKET_BYTES, gpus)
    hidden = min(first, seconds * 2 / 3 * 4 / 5)
    return Step(seconds, first + second, first + second - hidden)


def main() -> None:
    network = Network()
    print("| step | scaling | GPUs | images/GPU | computing, ms | all-reduce, ms | exposed all-reduce, ms |", end="")
    print(" step, ms | epoch, s | speedup | efficiency |\n|" + "---|" * 11)
    for computing in (FUSED, EAGER):
        for scaling in ("weak", "strong"):
            alone = 0.0
            for gpus in GPUS:
                images = 256 if scaling == "weak" else 256 / gpus
                one = step(computing, network, gpus, images)
                rate = images * gpus / one.ms
                alone = alone or rate
                cells = [
                    computing.name,
                    scaling,
                    f"{gpus}",
                    f"{images:.0f}",
                    f"{one.computing:.2f}",
                    f"{one.all_reduce:.3f}",
                    f"{one.exposed:.3f}",
                    f"{one.ms:.2f}",
                    f"{IMAGES / rate / 1e3:.3f}",
                    f"{rate / alone:.2f}",
                    f"{rate / alone / gpus:.0%}",
                ]
                print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
