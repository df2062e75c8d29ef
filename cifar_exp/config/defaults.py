"""The default settings, read from the YAML files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


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
    primary: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    defaults = [item for entry in primary["defaults"] if entry != "_self_" for item in entry.items()]
    # The default choice of each group comes first: messages suggest its values.
    paths = [conf_dir() / group / f"{choice}.yaml" for group, choice in defaults]
    for path in [*filter(Path.exists, paths), *sorted(conf_dir().rglob("*.yaml"))]:
        group = path.relative_to(conf_dir()).parts[0]
        if group in ("experiment", "hydra"):
            continue
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        prefix = "" if group == "config.yaml" else f"{group}."
        settings = {f"{prefix}{name}": value for name, value in flattened(content).items()} | settings
    hidden = ("hydra.", "defaults")
    return {name: value for name, value in settings.items() if not name.startswith(hidden) and "_target_" not in name}
