#!/usr/bin/env bash
# A tiny run on emulated ARM, and the same run on this machine for comparison.
#
#     sudo .ci/arm.sh [TREE]        TREE: where the ARM Debian is kept, made when it is missing (default: /var/tmp/cifar-exp-arm64)
#
# Needs root, 8 GB and an hour the first time, because qemu translates each instruction. It does not measure speed.
set -euo pipefail
cd "$(dirname "$0")/.."

tree="${1:-${CIFAR_EXP_ARM_TREE:-/var/tmp/cifar-exp-arm64}}"
processor=neoverse-n1       # float32 alone: no bfloat16, no SVE
midr=0x00000000411fd0c0 # its identification register
run=(experiment=quickstart data.train_count=1024 data.test_count=200 train.epochs=1 devices.count=1 tracking=none
    progress=quiet train.precision=fp32 train.deterministic=true)

needs() { # needs "what" "remedy" test...
    local what="$1" remedy="$2"
    shift 2
    "$@" > /dev/null 2>&1 || { echo "arm: $what is missing. $remedy" >&2; exit 4; }
}

check() {
    needs "root" "Run it with sudo." test "$(id -u)" = 0
    needs "qemu-aarch64-static" "Set it up with: apt install qemu-user-static binfmt-support" command -v qemu-aarch64-static
    needs "the kernel's rule for ARM programs" \
        "Set it up with: mount -t binfmt_misc none /proc/sys/fs/binfmt_misc; update-binfmts --enable qemu-aarch64" \
        test -e /proc/sys/fs/binfmt_misc/qemu-aarch64
    needs "uv" "Set it up with: python3 -m venv .venv && .venv/bin/pip install uv" command -v uv
    [ -x "$tree/usr/bin/python3" ] && return
    needs "the tree $tree and mmdebstrap, which makes it" "Set it up with: apt install mmdebstrap" command -v mmdebstrap
}

make_tree() {
    # Unpacked and not configured: so nothing has to run there, and it takes seconds.
    [ -x "$tree/usr/bin/python3" ] || mmdebstrap --quiet --architectures=arm64 --variant=extract \
        --include=python3,libgomp1,libstdc++6 bookworm "$tree"
    # Skipped if an earlier tree has them all.
    uv pip install --quiet --python-platform aarch64-unknown-linux-gnu \
        --python-version 3.11 --target "$tree/site" --requirements pyproject.toml --extra cpu
    mkdir -p "$tree"/{proc,dev,tmp,src,result}
    # oneDNN identifies the processor by these files. The host's /sys is of another processor, which crashes oneDNN.
    local cores="$tree/sys/devices/system/cpu" last=$(($(nproc) - 1))
    for core in $(seq 0 "$last"); do
        mkdir -p "$cores/cpu$core/regs/identification"
        echo "$midr" > "$cores/cpu$core/regs/identification/midr_el1"
    done
    for what in present possible online; do echo "0-$last" > "$cores/$what"; done
}

run_there() { # in a private mount namespace, so that nothing stays mounted
    rm -rf "$tree/result/run"
    # shellcheck disable=SC2016
    unshare --mount bash -euo pipefail -c '
        tree="$1" processor="$2"; shift 2
        mount -t proc proc "$tree/proc"
        mount --rbind /dev "$tree/dev"
        mount --bind "$PWD" "$tree/src"
        mount -o remount,bind,ro "$tree/src"
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TMPDIR=/tmp LANG=C.UTF-8 QEMU_CPU="$processor" \
            PYTHONPATH=/src:/site PYTHONDONTWRITEBYTECODE=1 \
            chroot "$tree" /usr/bin/python3 -m cifar_exp "$@"
    ' - "$tree" "$processor" "${run[@]}" hydra.run.dir=/result/run
}

check
make_tree
plain="$(mktemp -d)"
trap 'rm -rf "$plain"' EXIT
uv run --no-sync python -m cifar_exp "${run[@]}" hydra.run.dir="$plain/run"
run_there
uv run --no-sync python - "$plain/run" "$tree/result/run" <<'PYTHON'
"""Both runs' last figures; exit 1 where they differ by more than float32's rounding grows to."""
import json, sys
from pathlib import Path

def last(folder: str) -> dict[str, float]:
    lines = [json.loads(line)["metrics"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {name: value for metrics in lines for name, value in metrics.items()}

here, there = (last(folder) for folder in sys.argv[1:])
for name in ("train/loss", "test/loss", "test/accuracy"):
    print(f"{name:<14} here {here[name]:.4f}   on ARM {there[name]:.4f}")
sys.exit(abs(here["test/accuracy"] - there["test/accuracy"]) > 0.02 or abs(here["test/loss"] - there["test/loss"]) > 0.01)
PYTHON
