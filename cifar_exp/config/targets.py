"""The allow-list of `_target_`s by section, and the old names of renamed ones."""

from collections.abc import Iterable, Mapping
from typing import Any

from cifar_exp.errors import ConfigError

# Patterns have the form of Hydra 1.4: a dotted path, or a module with `.*` for everything inside. torch as a whole is
# not allowed: torch.hub.load, torch.load, torch.ops.load_library and others run code or write files.
# `runs/components.py` also checks the kind of each imported target.
ALLOWED: dict[str, tuple[str, ...]] = {
    "data": ("cifar_exp.data.*",),
    "augment": ("cifar_exp.data.augment.*",),
    "model": ("cifar_exp.models.*", "torch.nn.*", "torchvision.models.*"),
    "optimizer": ("cifar_exp.training.optimizers.*", "torch.optim.*"),
    "schedule": ("cifar_exp.training.schedules.*",),
    "launcher": ("cifar_exp.launch.*",),
    "tracking": ("cifar_exp.tracking.*",),
}
# Old name -> new name. Configurations and run folders of earlier versions have the old names.
RENAMED = {
    "cifar_exp.models.convnet": "cifar_exp.models.networks.convnet",
    "cifar_exp.models.resnet": "cifar_exp.models.networks.resnet",
    "cifar_exp.speednet.speednet": "cifar_exp.models.speednet.speednet",
    "cifar_exp.datasets.cifar10": "cifar_exp.data.cifar10.cifar10",
    "cifar_exp.datasets.folders": "cifar_exp.data.class_folders.folders",
    "cifar_exp.datasets.synthetic": "cifar_exp.data.synthetic.synthetic",
    "cifar_exp.augment.Shift": "cifar_exp.data.augment.Shift",
    "cifar_exp.augment.Crop": "cifar_exp.data.augment.Crop",
    "cifar_exp.augment.Alternating": "cifar_exp.data.augment.Alternating",
    "cifar_exp.augment.Identity": "cifar_exp.data.augment.Identity",
    "cifar_exp.optim.Muon": "cifar_exp.training.optimizers.Muon",
    "cifar_exp.optim.piecewise": "cifar_exp.training.schedules.piecewise",
    "cifar_exp.optim.cosine": "cifar_exp.training.schedules.cosine",
    "cifar_exp.optim.linear": "cifar_exp.training.schedules.linear",
    "cifar_exp.launch.ElasticLauncher": "cifar_exp.launch.elastic.ElasticLauncher",
    "cifar_exp.tracking.MLflowTracker": "cifar_exp.tracking.mlflow_tracker.MLflowTracker",
    "cifar_exp.tracking.NoTracker": "cifar_exp.tracking.tracker.NoTracker",
}
SCHEDULE_CONTRACT = (
    "it is not a schedule: a schedule is a function of (step, steps_per_epoch, epochs) that returns the factor on the "
    "learning rate. A scheduler of torch.optim takes an optimizer instead. Set schedule=piecewise, cosine or linear, "
    "or write a function of your own (docs/networks.md)"
)
FIRST_NAMES = {new: old for old, new in RENAMED.items()}


def with_names(content: Any, names: Mapping[str, str]) -> Any:
    """Rename every ``_target_`` in ``content``, at any depth.

    Args:
        content: mappings, lists and values; it is not modified.
        names: name -> replacement. :data:`RENAMED` gives today's names. :data:`FIRST_NAMES` gives the first names:
            hashes of configurations are computed with these and so stay the same in later versions.

    Returns:
        The renamed copy.
    """
    if isinstance(content, Mapping):
        return {
            key: names.get(str(value), value) if key == "_target_" else with_names(value, names)
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        return type(content)(with_names(value, names) for value in content)
    return content


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted path equals a pattern or is inside a module pattern that ends in ``.*``."""
    return any(path == pattern or (pattern.endswith(".*") and path.startswith(pattern[:-1])) for pattern in patterns)


def allowed(section: str, trusted: Iterable[str]) -> tuple[str, ...]:
    """The allowed patterns of a section, followed by those of the modules in ``trusted``."""
    own = tuple(pattern for module in trusted for pattern in (module, f"{module}.*"))
    return (*ALLOWED[section], *own)


def check_targets(section: str, content: Any, trusted: Iterable[str]) -> None:
    """Check every `_target_` in a section, at any depth, against the allow-list. Nothing is imported.

    Args:
        section: the name of the section, such as ``model``.
        content: the section.
        trusted: the modules of ``trusted_modules``.

    Raises:
        ConfigError: a `_target_` is not allowed. The message names the setting.
    """
    patterns = allowed(section, trusted)

    def check(part: Any, setting: str) -> None:
        if isinstance(part, Mapping):
            for key, value in part.items():
                if key == "_target_" and not matches(str(value), patterns):
                    if section == "schedule" and str(value).startswith("torch."):
                        raise ConfigError(f"{setting}._target_={value}: {SCHEDULE_CONTRACT}")
                    module = str(value).rpartition(".")[0] or str(value)
                    raise ConfigError(
                        f"{setting}._target_={value}: in {section} it must be from {', '.join(ALLOWED[section])}. If "
                        f"you trust that code, set 'trusted_modules=[{module}]'"
                    )
                check(value, f"{setting}.{key}")
        elif isinstance(part, list | tuple):
            for index, value in enumerate(part):
                check(value, f"{setting}.{index}")

    check(content, section)
