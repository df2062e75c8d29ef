"""Kill hosts and cut cables at random moments, again and again: ``python -m tests.multihost --kills 20 --cuts 10``.

After each, the other host must end by itself with exit code 7. Then both hosts resume the run, and its weights must be
those of a run that nothing happened to. Prints a table; ``--json`` writes it to a file, too.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from cifar_exp.records.checkpoint import newest_intact_manifest
from tests.helpers.hosts import HERE, Command, Host, hosts, steps, wait_for
from tests.helpers.paced import ENDLESS

# 300 steps of 0.05 s; a checkpoint every 2 epochs, which are 3 steps each.
RUN = (*ENDLESS, *HERE, "train.epochs=100", "checkpoint.every=2", "train.deterministic=true")
LONGEST = 8.0  # seconds of training before something happens


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    choose = random.Random(options.seed)
    with hosts(2, "r") as pair:
        assert [command.ended()[0] for command in both(pair)] == [0, 0]
        wanted = load_file(pair[0].folder / "run" / "model.safetensors")
    faults = ["kill"] * options.kills + ["cut"] * options.cuts
    rows = [tried(fault, choose, wanted) for fault in faults]
    for row in rows:
        print(row)
    for fault in ("kill", "cut"):
        of_it = [row for row in rows if row["fault"] == fault]
        right = [row for row in of_it if row["is_right"]]
        longest = max((float(row["seconds"]) for row in of_it), default=0.0)
        print(f"{fault}: {len(right)} of {len(of_it)} right; the other host had ended after {longest:.1f} s at most")
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "rows": rows}, indent=1) + "\n")


def both(pair: Sequence[Host], *words: str) -> tuple[Command, Command]:
    """Start the run on both hosts."""
    other = pair[1].start(*RUN, *words)
    return pair[0].start(*RUN, *words), other


def tried(fault: str, choose: random.Random, wanted: dict[str, torch.Tensor]) -> dict[str, object]:
    """One try. Returns what was found."""
    with hosts(2, fault) as pair:
        commands = both(pair)
        wait_for(lambda: steps(pair[0]) > 3, *commands)
        time.sleep(choose.uniform(0, LONGEST))
        victim = choose.randrange(2)
        if fault == "kill":
            commands[victim].kill()
        else:
            pair[1].cut()
        began = time.monotonic()
        ended = [command for place, command in enumerate(commands) if fault == "cut" or place != victim]
        codes = [command.ended()[0] for command in ended]
        seconds = time.monotonic() - began
        left = [line for command in ended for line in command.left_behind]
        pair[1].join()
        run = pair[0].folder / "run"
        trained = max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
        manifest = newest_intact_manifest(run, print)
        saved = manifest.step if manifest else 0
        resumed = [command.ended()[0] for command in both(pair, "resume=auto")]
        ours = load_file(run / "model.safetensors")
        is_equal = ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)
        return {
            "fault": fault,
            "host": victim if fault == "kill" else "both",
            "codes": codes,
            "seconds": round(seconds, 1),
            "processes left": left,
            "steps trained": trained,
            "steps saved": saved,
            "exit codes of the resumed run": resumed,
            "weights equal": is_equal,
            "is_right": set(codes) == {7} and not left and resumed == [0, 0] and is_equal and trained - saved <= 7,
        }


if __name__ == "__main__":
    main()
