"""The settings that affect a run's result. Resuming, sweeps and studies use this one list."""

# Sections that may change on resume. `devices` is one: a resumed run keeps its global batch on any number of ranks.
NO_EFFECT_SECTIONS = (
    "resume",
    "progress",
    "trusted_modules",
    "tracking",
    "checkpoint",
    "launcher",
    "devices",
    "report",
)
# Settings of other sections that do not affect the trained weights. They can affect the throughput.
NO_EFFECT_SETTINGS = ("data.residency", "data.workers", "data.endpoint", "data.cache_limit")
SEED = "seed"  # differs between repeats of an experiment
HOSTS = "launcher.hosts"
DEVICE_COUNT = "devices.count"  # the axis of a speedup study
SETTINGS_OUTSIDE_A_SWEEP = ("resume", "progress")  # how a sweep is started and displayed; not part of its identity


def bears_on_result(setting: str) -> bool:
    """Whether a run may not be resumed with another value of this dotted setting."""
    return setting.partition(".")[0] not in NO_EFFECT_SECTIONS and setting not in NO_EFFECT_SETTINGS


def distinguishes_sweeps(setting: str) -> bool:
    """Whether two sweeps that differ in this dotted setting are different experiments. Throughput counts, too."""
    return setting.partition(".")[0] not in (*NO_EFFECT_SECTIONS, SEED)


def distinguishes_groups(setting: str) -> bool:
    """Whether jobs of a sweep that differ in this dotted setting belong to different groups of its study."""
    return setting not in (DEVICE_COUNT, SEED)
