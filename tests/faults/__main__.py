"""The command: inject every fault and print a table of the results.

uv run python -m tests.faults                      # all faults, racy ones 20 times each
uv run python -m tests.faults --only '*SQLite*' --repeat 1
uv run python -m tests.faults --list
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.cases import CASES
from tests.faults.scene import OWN_MOUNTS, Suite
from tests.faults.table import Row, as_json, as_markdown, run_case, totals


def main() -> int:
    """Run the chosen cases. Return 0 if every fault that could be tried was handled."""
    chosen = _parser().parse_args()
    cases = [case for case in CASES if chosen.only is None or any(_matches(name, chosen.only) for name in case.faults)]
    cases = [case for case in cases if not (case.slow and chosen.without_slow) and (case.quick or not chosen.quick)]
    if chosen.list:
        for case in cases:
            marks = [mark for mark in ("racy", "quick", "slow") if getattr(case, mark)]
            print("\n".join(f"{fault}  ({', '.join(marks)})" if marks else fault for fault in case.faults))
        return 0
    _enter_own_mounts()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: running commands are ended first
    base = Path(tempfile.mkdtemp(prefix="faults-", dir=chosen.folder))
    suite = Suite(base, chosen.seed, chosen.repeat, chosen.examples, chosen.damages, chosen.jobs)
    print(f"seed {chosen.seed}; racy faults {chosen.repeat} times each; folders in {base}", flush=True)
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        began = time.monotonic()
        found = run_case(case, suite)
        rows += found
        for row in found:
            print(f"[{number}/{len(cases)}] {row.line()}", flush=True)
            if row.problem:
                print(row.problem, file=sys.stderr, flush=True)
        print(f"    {case.name}: {time.monotonic() - began:.0f} s", flush=True)
        for path, text in ((chosen.json, as_json), (chosen.markdown, as_markdown)):
            if path:  # after every case: an interrupted suite keeps its results
                path.write_text(text(rows, suite))
    print(f"\n{as_markdown(rows, suite)}")
    failed = [row for row in rows if row.problem]
    for row in failed:
        print(f"\n== {row.fault}\n{row.problem}", file=sys.stderr)
    print(totals(rows))
    if not failed and not chosen.keep:
        shutil.rmtree(base)
    return 1 if failed else 0


def _matches(name: str, patterns: list[str]) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Inject every fault, print a table.")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="faults whose names match, as '*SIGKILL*'")
    parser.add_argument("--repeat", type=int, default=20, help="how often a racy fault is tried (%(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of random moments (the time of day)")
    parser.add_argument("--examples", type=int, default=10_000, help="random overrides (%(default)s)")
    parser.add_argument("--damages", type=int, default=10_000, help="damaged checkpoints (%(default)s)")
    parser.add_argument("--jobs", type=int, default=200, help="runs of the long sweep (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the faults that the test suite includes")
    parser.add_argument("--without-slow", action="store_true", help="skip faults that take minutes")
    parser.add_argument("--list", action="store_true", help="print the faults and do nothing")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--folder", type=Path, help="folder for the runs (the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders")
    return parser


def _enter_own_mounts() -> None:
    """If the suite may mount, use a private mount namespace: its mounts end with this process."""
    if OWN_MOUNTS in os.environ or os.geteuid() != 0 or shutil.which("unshare") is None:
        return
    script = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode == 0:
        os.environ[OWN_MOUNTS] = "1"
        os.execvp("unshare", [*inside, sys.executable, "-m", "tests.faults", *sys.argv[1:]])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
