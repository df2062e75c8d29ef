"""Where people run this: surroundings of a program, each with a real command from typed line to tracked result.

uv run python -m tests.platforms.environments                     # all of them, and a table
uv run python -m tests.platforms.environments --only '*home*'
uv run python -m tests.platforms.environments --list

In each a sweep over two numbers of devices trains, is tracked in MLflow and ends in its report. It works where the
command ends with 0, the tracked accuracies are those of the plain run, and nothing else is left behind.
"""

import argparse
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
COMMAND = [
    *("-m", "data=synthetic", "data.train_count=96", "data.test_count=64", "data.root=data"),
    *("train.batch_size=16", "train.epochs=1", "model.width=4", "model.depth=1", "train.precision=fp32"),
    *("devices=cpu", "devices.count=1,2", "devices.threads=1", "devices.oversubscribe=true"),
]
NOBODY = 2000  # a user id without an entry in passwd
UNNAMED = ("setpriv", "--reuid", str(NOBODY), "--clear-groups")
# Where the interpreter lies below a folder that is another user's, it is read all the same; nothing more is allowed.
READING = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
PROXIES = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")


@dataclass(frozen=True)
class Environment:
    """One kind of surroundings; ``{place}`` stands for its folder, which holds home, temporary and current folder.

    Attributes:
        name: what the table calls it.
        variables: of the environment; None takes one away.
        prefix: what is typed before the command.
        overrides: what is typed after it.
        folder: the current folder's name.
        root: whether only root can make it.
        own_caches: whether caches lie where they do by default, and have to be made anew.
        outputs: where the results are to be found, from ``{place}``.
        quick: whether it is among the tests.
    """

    name: str
    variables: Mapping[str, str | None] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    folder: str = "work"
    root: bool = False
    own_caches: bool = False
    outputs: str = ""
    quick: bool = False


def shell(commands: str) -> tuple[str, ...]:
    """What is typed before the command, to be run after ``commands``."""
    return "sh", "-c", f'{commands} && exec "$@"', "sh"


def mounts(commands: str) -> tuple[str, ...]:
    """The same with a view of the file system of its own."""
    return "unshare", "-m", *shell(f"mount --make-rprivate / && {commands}")


READ_ONLY = 'for part in {parts}; do mount --bind "$part" "$part" && mount -o remount,bind,ro "$part"; done'
READ_ONLY_ROOT = (
    'mount --bind "{place}" "{place}" && findmnt -rno TARGET | while read -r part; do case "$part" in '
    '"{place}"|/dev*|/proc*|/sys*) ;; *) mount -o remount,bind,ro "$part" || exit 1;; esac; done && cd "$PWD"'
)
ELSEWHERE = "{place}/elsewhere"
ENVIRONMENTS = [
    Environment("plain"),
    Environment("LC_ALL=C", {"LC_ALL": "C"}),
    Environment("ASCII alone", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    Environment("no HOME", {"HOME": None}, own_caches=True),
    Environment("no HOME, no passwd entry", {"HOME": None}, UNNAMED, root=True, own_caches=True, quick=True),
    Environment("HOME=/, which may not be written, no passwd entry", {"HOME": "/"}, UNNAMED, root=True),
    Environment("HOME=/nonexistent", {"HOME": "/nonexistent"}, own_caches=True),
    Environment("caches by default", own_caches=True),
    Environment("XDG_CACHE_HOME elsewhere", {"XDG_CACHE_HOME": "{place}/xdg"}, own_caches=True),
    Environment(
        "read-only site-packages",
        prefix=mounts(READ_ONLY.replace("{parts}", f"'{sys.prefix}' '{REPO}'")),
        root=True,
    ),
    Environment("read-only root", prefix=mounts(READ_ONLY_ROOT), root=True, own_caches=True),
    Environment(
        "read-only root, no HOME, no passwd entry",
        {"HOME": None},
        (*mounts(READ_ONLY_ROOT), *UNNAMED),
        root=True,
        own_caches=True,
    ),
    Environment("TMPDIR with spaces", {"TMPDIR": "{place}/my temporary files ä"}),
    Environment("TMPDIR of 150 characters", {"TMPDIR": "{place}/" + "long" * 37}),
    Environment("current folder with spaces", folder="my wörk, 100% = mine"),
    Environment(
        "read-only current folder",
        prefix=mounts('mount --bind "$PWD" "$PWD" && mount -o remount,bind,ro "$PWD" && cd "$PWD"'),
        overrides=(
            *(f"hydra.sweep.dir={ELSEWHERE}/sweep", f"data.root={ELSEWHERE}/data"),
            f"tracking.uri=sqlite:///{ELSEWHERE}/outputs/mlflow.db",
        ),
        root=True,
        outputs="elsewhere",
    ),
    Environment("PYTHONOPTIMIZE=2", {"PYTHONOPTIMIZE": "2"}),
    Environment("PYTHONSAFEPATH=1", {"PYTHONSAFEPATH": "1"}),
    Environment("PYTHONHASHSEED=0, no bytecode", {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}),
    Environment("256 open files", prefix=shell("ulimit -n 256")),
    Environment("proxies that do not answer", PROXIES),
    Environment("a notebook's MPLBACKEND", {"MPLBACKEND": "module://missing_inline.backend"}, quick=True),
    Environment("COLUMNS=40", {"COLUMNS": "40", "LINES": "10"}),
    Environment("a terminal, TERM=dumb", {"TERM": "dumb"}, ("script", "-qefc", "{command}", "{place}/typescript")),
    Environment("NO_COLOR, FORCE_COLOR", {"NO_COLOR": "1", "FORCE_COLOR": "1"}),
    Environment("stdin closed", prefix=shell("exec <&-")),
    Environment("umask 077", prefix=shell("umask 077")),
    Environment("umask 000", prefix=shell("umask 000")),
    Environment("TZ=Asia/Kathmandu", {"TZ": "Asia/Kathmandu"}),
    Environment("OMP_NUM_THREADS=1", {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
    Environment("CUDA_VISIBLE_DEVICES=''", {"CUDA_VISIBLE_DEVICES": ""}),
    Environment("HYDRA_FULL_ERROR=1", {"HYDRA_FULL_ERROR": "1"}),
    Environment("nice, SCHED_BATCH", prefix=("nice", "-n", "5", "chrt", "--batch", "0")),
]


@dataclass(frozen=True)
class Outcome:
    """What became of the command: the tracked accuracies by parent and children, and what is wrong."""

    name: str
    seconds: float
    accuracies: Sequence[float]
    problem: str = ""
    not_run: str = ""

    def line(self) -> str:
        result = f"NOT RUN: {self.not_run}" if self.not_run else "FAILED" if self.problem else "works"
        return f"{self.name:<52} {self.seconds:>6.0f} s  {result}"


def try_in(environment: Environment, base: Path, expected: Sequence[float] | None = None) -> Outcome:
    """Run the command in ``environment``, in a folder below ``base``; ``expected``: the plain run's figures."""
    if lacking := _lacking(environment):
        return Outcome(environment.name, 0.0, (), not_run=lacking)
    place = base / f"{ENVIRONMENTS.index(environment):02}"
    work, variables = _prepare(environment, place, base)
    began = time.monotonic()
    done = subprocess.run(
        _words(environment, place), cwd=work, env=variables, capture_output=True, check=False, timeout=1800
    )
    seconds = time.monotonic() - began
    output = (done.stdout + done.stderr).decode(errors="replace")[-3000:]
    if done.returncode:
        return Outcome(environment.name, seconds, (), f"exit code {done.returncode}\n{output}")
    results = place / environment.outputs if environment.outputs else work
    found = tracked(results / "outputs" / "mlflow.db")
    problems = [] if expected is None or found == expected else [f"accuracies {found} in place of {expected}"]
    if not list(results.rglob("speedup.png")) and not list(place.rglob("speedup.png")):
        problems.append("no report")
    problems += [f"left behind: {path}" for path in left_behind(place, work)]
    return Outcome(environment.name, seconds, found, "\n".join([*problems, output]) if problems else "")


def _lacking(environment: Environment) -> str:
    if environment.root and os.geteuid() != 0:
        return "takes root"
    tool = environment.prefix[0] if environment.prefix else "sh"
    return "" if shutil.which(tool) else f"takes {tool}"


def _prepare(environment: Environment, place: Path, base: Path) -> tuple[Path, dict[str, str]]:
    """The current folder and the environment's variables: nothing of the caller's but the path."""
    work = place / environment.folder
    variables: dict[str, str | None] = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "LANG": "C.UTF-8",
        "CIFAR_EXP_CACHE_DIR": None if environment.own_caches else str(base / "caches"),
    }
    variables |= {name: value and value.replace("{place}", str(place)) for name, value in environment.variables.items()}
    named = [variables.get(name) or "" for name in ("TMPDIR", "XDG_CACHE_HOME")]
    folders = [base / "caches", place / "home", place / "elsewhere", work, *(Path(name) for name in named if name)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        if UNNAMED[0] in environment.prefix:
            os.chown(folder, NOBODY, NOBODY)
    base.chmod(0o755)
    if environment.outputs:
        (place / environment.outputs / "outputs").mkdir()
    return work, {name: value for name, value in variables.items() if value is not None}


def _words(environment: Environment, place: Path) -> list[str]:
    command = [str(Path(sys.executable).parent / "cifar-exp"), *COMMAND, *environment.overrides]
    prefix = [*environment.prefix, *(READING if UNNAMED[0] in environment.prefix else ())]
    typed = " ".join(command)
    if "{command}" in prefix:
        command = []
    return [word.replace("{place}", str(place)).replace("{command}", typed) for word in (*prefix, *command)]


def tracked(store: Path) -> list[float]:
    """Test accuracies of all runs in an MLflow store, of those alone that have finished."""
    query = (
        "select value from metrics join runs using (run_uuid) "
        "where key = 'test/accuracy' and status = 'FINISHED' order by value"
    )
    connection = sqlite3.connect(f"file:{store}?mode=ro", uri=True)
    try:
        return [value for (value,) in connection.execute(query)]
    finally:
        connection.close()


def left_behind(place: Path, work: Path) -> Iterator[Path]:
    """What ``place`` holds beside results, images, and the caches that the documentation names."""
    named = ("home/.cache/cifar-exp", "xdg/cifar-exp", "typescript", "elsewhere", f"tmp/cifar-exp-cache-{os.geteuid()}")
    allowed = [place / name for name in (*named, f"tmp/cifar-exp-cache-{NOBODY}")]
    allowed += [work / "outputs", work / "data"]
    for path in sorted(place.rglob("*")):
        is_part = any(path == known or known in path.parents or path in known.parents for known in allowed)
        is_given = path.is_dir() and path.parent == place
        if not is_part and not is_given:
            yield path


def main() -> int:
    """Try all that were chosen; 0 where each works that could be tried."""
    chosen = _parser().parse_args()
    wanted = [known for known in ENVIRONMENTS if any(fnmatchcase(known.name, pattern) for pattern in chosen.only)]
    if chosen.list:
        print("\n".join(known.name for known in wanted))
        return 0
    base = Path(tempfile.mkdtemp(prefix="environments-", dir=chosen.folder))
    plain = try_in(ENVIRONMENTS[0], base)  # makes the caches, too
    print(plain.line(), flush=True)
    rows = [plain]
    with ThreadPoolExecutor(chosen.jobs) as pool:
        rest = [known for known in wanted if known is not ENVIRONMENTS[0]]
        for row in pool.map(partial(try_in, base=base, expected=plain.accuracies), rest):
            print(row.line(), flush=True)
            if row.problem:
                print(row.problem, flush=True)
            rows.append(row)
    failed = [row for row in rows if row.problem]
    tried = [row for row in rows if not row.not_run]
    print(f"\n{len(tried) - len(failed)} of {len(tried)} work; {len(rows) - len(tried)} could not be tried here")
    if not failed:
        shutil.rmtree(base)
    return 1 if failed or (chosen.require_all and len(tried) < len(rows)) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.platforms.environments", description="Run where people run this."
    )
    parser.add_argument(
        "--only", metavar="PATTERN", nargs="+", default=["*"], help="those whose names match, as '*home*'"
    )
    parser.add_argument("--list", action="store_true", help="print the names and do nothing")
    parser.add_argument("--require-all", action="store_true", help="one that cannot be tried here is a failure")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where they are made (the temporary folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
