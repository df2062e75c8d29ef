"""The default settings, read from the YAML files."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_UNSET = ("experiment", "hydra")  # groups that only change the settings of others


def conf_dir() -> Path:
    """The folder of the config groups: inside the package in a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names: ``{"model": {"width": 32}}`` -> ``{"model.width": 32}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def default_settings() -> dict[str, Any]:
    """All settings of the package's YAML files: dotted name -> value. Default choices of a group take precedence."""
    settings: dict[str, Any] = {}
    for content in _contents():
        settings = flattened(content) | settings
    return {name: value for name, value in settings.items() if "_target_" not in name}


def settings_of(group: str, choice: str) -> dict[str, Any]:
    """The settings of one choice of a group, without its `_target_`: ``settings_of("model", "convnet")``."""
    return {name: value for name, value in _choice(conf_dir() / group / f"{choice}.yaml").items() if name != "_target_"}


def defaults_beside(targets: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that belong to the chosen components: nested settings.

    Args:
        targets: section -> its `_target_`, by its current name. A section gets the defaults of the first choice with
            that `_target_`. Any other section gets those of the group's default choice.
    """
    defaults: dict[str, Any] = {}
    for content in _contents():
        for name, part in content.items():
            if not isinstance(part, Mapping):
                defaults[name] = part
                continue
            section = defaults.setdefault(name, {})
            target = targets.get(name) or section.get("_target_")
            if target in (None, part.get("_target_", target)):
                defaults[name] = dict(part) | section
    return defaults


@cache
def _contents() -> tuple[dict[str, Any], ...]:
    """The settings of each YAML file, nested: of ``config.yaml``, the default choices of groups, all other choices."""
    primary = _loaded(conf_dir() / "config.yaml")
    defaults = [item for entry in primary.pop("defaults") if entry != "_self_" for item in entry.items()]
    chosen = [conf_dir() / group / f"{choice}.yaml" for group, choice in defaults if group not in _UNSET]
    others = [path for path in sorted(conf_dir().glob("*/*.yaml")) if path.parent.name not in _UNSET]
    paths = dict.fromkeys([*filter(Path.exists, chosen), *others])
    primary.pop("hydra", None)
    return (primary, *({path.parent.name: _choice(path)} for path in paths))


def _choice(path: Path) -> dict[str, Any]:
    """The settings of one choice of a group, with those of the choices that it extends."""
    content = _loaded(path)
    for base in content.pop("defaults", ()):
        if base != "_self_":
            content = _choice(path.with_name(f"{base}.yaml")) | content
    return content


def _loaded(path: Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(content)
