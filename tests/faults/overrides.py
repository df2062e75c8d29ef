"""Random overrides: each gives a valid config, or one message that names its key; no traceback, no hang."""

import time
from collections.abc import Sequence
from contextlib import suppress

from hydra import compose
from hypothesis import HealthCheck, Phase, example, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from cifar_exp.config.defaults import conf_dir, default_settings
from cifar_exp.config.hydra_errors import explained
from cifar_exp.config.hydra_versions import composing
from cifar_exp.config.reading import read_config, register_resolvers
from cifar_exp.errors import CifarExpError, ConfigError, MachineError
from cifar_exp.runs.components import build
from tests.faults.registry import case
from tests.faults.scene import Scene

TRAIN_COUNT = 50_000  # training images
SLOWEST = 5.0  # maximum CPU seconds for one config
LONGEST = 60.0  # maximum wall seconds; generous, because other processes may use the cores
GROUPS = ("data", "augment", "model", "optimizer", "schedule", "devices", "launcher", "tracking", "experiment")
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]
KEYS = sorted(name for name in default_settings() if name not in ("trusted_modules", "resume"))
TARGETS = (
    *(
        "os.system",
        "builtins.eval",
        "torch.hub.os.system",
        "torch.nn.Nothing",
        "cifar_exp",
        "cifar_exp.models.networks.convnet",
    ),
    *(
        "cifar_exp.models.networks",
        "..",
        "torch.",
        ".torch",
        "cifar_exp.errors.ConfigError",
        "",
        "torch.optim.LBFGS",
        "1",
    ),
)

numbers = st.one_of(
    st.integers(-(10**20), 10**20).map(str), st.integers(-3, 300).map(str), st.floats().map(str), st.just("1e999")
)
WORDS = """null true false auto nan inf -inf '' "" ~ yes off 0x10 1_000 1e3 weak strong fp32 device loader
[] {} [1,2] [0.5,1] [[1]] {a:1} {a:{b:[c]}} [null] [''] [-1] [true] [0] 1,2 a,b a=b x:y é 日本
${seed} ${nothing} ${model} ${train.epochs} ${oc.env:NO_SUCH} ${cores:x} ${now:%Y} ${"""
words = st.sampled_from([*WORDS.split(), "", "a b", "'a b'", '"\\""'])
values = st.one_of(numbers, words, st.text(max_size=12))
known = st.builds("{}={}".format, st.sampled_from(KEYS), values)
prefixed = st.builds("{}{}={}".format, st.sampled_from(["+", "++", "~", ""]), st.sampled_from(KEYS), values)
choices = st.one_of(
    st.sampled_from(CHOICES), st.builds("{}={}".format, st.sampled_from(GROUPS), st.one_of(words, st.text(max_size=8)))
)


def misspelt(key: str, place: int, letter: str) -> str:
    place %= len(key)
    return key[:place] + letter + key[place + 1 :]


unknown = st.builds(
    "{}{}={}".format,
    st.sampled_from(["", "+", "++"]),
    st.builds(misspelt, st.sampled_from(KEYS), st.integers(0, 30), st.sampled_from("abcxyz_")),
    values,
)
targets = st.builds("{}._target_={}".format, st.sampled_from([g for g in GROUPS if g != "experiment"]),
                    st.sampled_from(TARGETS))  # fmt: skip
raw = st.text(min_size=1, max_size=20)
overrides: SearchStrategy[list[str]] = st.lists(
    st.one_of(known, known, known, prefixed, choices, unknown, targets, raw), min_size=1, max_size=3
)


def outcome(typed: Sequence[str]) -> CifarExpError | None:
    """The error that the command would print, or None if it would start. A bug is raised."""
    try:
        composed = compose("config", list(typed))
    except Exception as error:  # as in commandline.run_hydra
        if (problem := explained(error, typed)) is None:
            raise
        return problem
    from cifar_exp.launch.devices import find_devices
    from cifar_exp.training.plan import check_scaling, make_plan

    try:
        config = read_config(composed)
        parts = build(config)
        with suppress(MachineError):
            devices = find_devices(config.devices)
            check_scaling(config, devices.world_size)
            make_plan(config, devices.world_size, TRAIN_COUNT, parts.schedule)
    except CifarExpError as error:
        return error
    return None


def check(typed: list[str], counts: dict[bool, int]) -> None:
    """Check that there is one message, in time, that names one of the typed keys."""
    began, computed = time.monotonic(), time.process_time()
    error = outcome(typed)
    passed, computed = time.monotonic() - began, time.process_time() - computed
    assert computed < SLOWEST, f"{typed} took {computed:.0f} s"
    assert passed < LONGEST, f"{typed} waited {passed:.0f} s"
    counts[error is None] += 1
    if error is None:
        return
    message = str(error)
    assert isinstance(error, ConfigError), f"{typed}: {error!r}"
    assert message.strip(), f"{typed}: an empty message"
    assert "Traceback" not in message
    names = [key(word) for word in typed]
    named = any(part and part in message for name in names for part in name.split("."))
    assert named or any(word in message for word in typed), f"{typed}: the message names no key of it: {message}"


def key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition("@")[0].strip()


@case("random overrides", quick=True)
def random_overrides(scene: Scene) -> None:
    counts = {True: 0, False: 0}
    count = 100 if scene.suite.repeat == 1 else scene.suite.examples

    @seed(scene.suite.seed)
    @hypothesis_settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(overrides)
    @example(["train.epochs=999999999999"])
    @example(["train.epochs=${train.epochs}"])
    def run(typed: list[str]) -> None:
        check(typed, counts)

    register_resolvers()
    with composing(conf_dir()):
        run()
    counted = f"{sum(counts.values()):,} tried: {counts[True]:,} accepted, {counts[False]:,} refused by name"
    scene.handled("random overrides", f"none needed: {counted}")
