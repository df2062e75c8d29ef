"""Test other Python versions, dependencies and environments. `nox --list` lists the sessions; `nox -s wheel` runs one.

uv creates an environment per session. A session whose Python is missing is skipped with a message, or fails with
`--error-on-missing-interpreters`. `.ci/run` is faster: it tests one interpreter.
"""

import os
import re
from pathlib import Path

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.sessions = ["tests", "lowest", "newest", "hydra-rc", "wheel", "newcomer", "environments", "avx2", "macos"]

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
OLDEST, NEWEST = PYTHONS[0], PYTHONS[-1]
# What PyTorch, oneDNN and numba see on a processor without AVX512.
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}


def synchronize(session: nox.Session) -> None:
    """Install what `uv run` installs: the versions of the date in pyproject.toml."""
    place = session.virtualenv.location
    session.run_install("uv", "sync", "--quiet", f"--python={place}", env={"UV_PROJECT_ENVIRONMENT": place})


def install(session: nox.Session, *options: str) -> None:
    """Install the checkout and its development tools, with ``options`` of the resolver."""
    session.install(*options, "--editable", ".[cpu]", "--group", "dev")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The whole test suite."""
    synchronize(session)
    session.run("pytest", *session.posargs)


@nox.session(python=OLDEST)
def lowest(session: nox.Session) -> None:
    """The whole test suite with the oldest versions that pyproject.toml allows."""
    install(session, "--resolution=lowest-direct")
    session.run("pytest", *session.posargs)


@nox.session(python=NEWEST)
def newest(session: nox.Session) -> None:
    """The whole test suite with the newest releases."""
    install(session, "--no-config", "--upgrade")
    session.run("pytest", *session.posargs)


@nox.session(name="hydra-rc", python=NEWEST)
def hydra_rc(session: nox.Session) -> None:
    """The whole test suite with the release candidates of Hydra and OmegaConf.

    `tests/config/test_hydra_versions.py` turns their warnings into errors and checks that no command prints one.
    After the release of Hydra 1.4, `newest` covers it: remove this session.
    """
    install(session, "--no-config", "--upgrade", "hydra-core>=1.4.0rc3", "omegaconf>=2.4.0rc1")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Install the wheel with the newest versions; train a run and a sweep in an empty folder."""
    empty, dist = session.create_tmp(), Path(session.create_tmp()).absolute() / "dist"
    session.run_install("uv", "build", "--quiet", "--wheel", f"--out-dir={dist}", external=True)
    (built,) = dist.glob("*.whl")
    session.install("--no-config", f"cifar-exp[cpu] @ {built.as_uri()}")
    with session.chdir(empty):
        session.run("cifar-exp", "experiment=quickstart")
        session.run("cifar-exp", "-m", "experiment=quickstart", "train.epochs=1", "model.width=4,8")


@nox.session(python=PYTHONS)
def newcomer(session: nox.Session) -> None:
    """The README's first commands in a fresh clone."""
    session.run(".ci/newcomer.sh", external=True)


@nox.session(python=OLDEST)
def environments(session: nox.Session) -> None:
    """Read-only installations, users without a name, other locales, ...: in each, train and track a run."""
    synchronize(session)
    session.run("python", "-m", "tests.platforms.environments", *session.posargs)


@nox.session(python=OLDEST)
def avx2(session: nox.Session) -> None:
    """Emulate a laptop processor with AVX2 and without AVX512: test the kernels and the quickstart's accuracy."""
    synchronize(session)
    # bfloat16 is left out: PyTorch still sees the real processor's bfloat16, for which oneDNN has no AVX2 kernel.
    session.run("pytest", "-k", "(fused or kernel) and not (reference_kernel and bfloat16)", env=AVX2)
    with session.chdir(session.create_tmp()):
        output = session.run("cifar-exp", "experiment=quickstart", "train.precision=fp32", env=AVX2, silent=True)
    found = re.search(r"test accuracy ([\d.]+)", str(output))
    if not found or float(found[1]) < 0.9:
        session.error(f"the quickstart does not reach its accuracy: {output}")


@nox.session(python=OLDEST)
def macos(session: nox.Session) -> None:
    """Emulate macOS on Linux: remove what macOS lacks."""
    synchronize(session)
    session.run("mypy", "--platform=darwin")
    session.run("pytest", "tests/platforms/test_macos.py", *session.posargs)


@nox.session(venv_backend="none")
def arm(session: nox.Session) -> None:
    """A tiny run on emulated ARM. Needs root and an hour; fails with a message if the machine lacks something."""
    session.run(".ci/arm.sh", *session.posargs, env={"PATH": os.environ["PATH"]}, external=True)
