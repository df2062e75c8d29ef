"""Which settings bear on a run's result: the one list that resuming, sweeps and studies go by."""

# Whole sections without influence on what is trained. Other devices share the same batches.
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
# Settings of other sections without influence on what is trained. They can change how fast it is.
NO_EFFECT_SETTINGS = ("data.residency", "data.workers")
SEED = "seed"  # what repeats of one experiment differ in
DEVICE_COUNT = "devices.count"  # the axis of a speedup study
NO_PART_OF_A_SWEEP = ("resume", "progress")  # how a sweep is started and shown: not part of its identity


def bears_on_result(setting: str) -> bool:
    """Whether a run with another value of this dotted setting trains something else."""
    return setting.partition(".")[0] not in NO_EFFECT_SECTIONS and setting not in NO_EFFECT_SETTINGS


def distinguishes_sweeps(setting: str) -> bool:
    """Whether two sweeps that differ in this dotted setting measure different things; speed counts here, too."""
    return setting.partition(".")[0] not in (*NO_EFFECT_SECTIONS, SEED)


def distinguishes_groups(setting: str) -> bool:
    """Whether jobs of one sweep that differ in this dotted setting belong to different groups of its study."""
    return setting not in (DEVICE_COUNT, SEED)
