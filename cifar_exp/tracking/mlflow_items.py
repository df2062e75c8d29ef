"""Params, tags and metrics in the form that MLflow accepts. If one is refused, the others are still logged."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cifar_exp.system.printable import print_notice, printable
from cifar_exp.tracking.store_problems import is_permanent, shortened_error

LONGEST_NAME = 250  # MLflow's limit
LONGEST_VALUE = 6000  # of a param; a tag may have more
OLDER_LIMITS = (5000, 500, 250)  # characters of a value in older servers
PARAMS_OR_TAGS, METRICS = 100, 1000  # MLflow's limits per batch
# Error codes for an invalid request.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_TOO_LARGE = "error code 413"


def allowed_name(name: str) -> str:
    """The name under which MLflow accepts a param, tag or metric.

    Characters that MLflow refuses become underscores. So do slashes and dots that would change the path: MLflow uses
    the name as a file path. A long name is cut and gets a hash of the full name.
    """
    allowed = re.sub(r"[^\w\-. :/]", "_", name)
    parts = [part if part.strip(".") else "_" * max(1, len(part)) for part in allowed.split("/")]
    allowed = "/".join(parts)
    return allowed if len(allowed) <= LONGEST_NAME else f"{allowed[: LONGEST_NAME - 9]}_{_hash(name)}"


class MetricNames:
    """The unique names under which MLflow accepts a run's metrics.

    They depend only on the order of the journal. So a run in progress and a later delivery choose the same ones.
    """

    def __init__(self) -> None:
        self._allowed: dict[str, str] = {}
        self._taken: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Choose the names for the metrics of the journal's next entry. Those of earlier entries stay."""
        new = [name for name in names if name not in self._allowed]
        for name in sorted(new, key=lambda name: allowed_name(name) != name):  # an allowed name first: it is kept
            allowed = allowed_name(name)
            if allowed in self._taken:
                allowed = _distinct(allowed, name)
            self._allowed[name] = allowed
            self._taken.add(allowed)

    def __getitem__(self, name: str) -> str:
        return self._allowed[name]


def with_allowed_names(items: Mapping[str, Any]) -> dict[str, str]:
    """Params or tags with unique, allowed names, and values as text of a length that MLflow accepts."""
    kept = {name for name in items if allowed_name(name) == name}
    found: dict[str, str] = {}
    for name, value in items.items():
        allowed = allowed_name(name)
        if name not in kept and (allowed in kept or allowed in found):
            allowed = _distinct(allowed, name)
        found[allowed] = cut(printable(value), LONGEST_VALUE)
    return found


def cut(text: str, limit: int) -> str:
    """At most ``limit`` characters of ``text``; the end of a longer one is replaced by dots."""
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def log_each(items: Sequence[Any], limit: int, log: Callable[[Sequence[Any]], object], reported: set[str]) -> None:
    """Log params, tags or metrics in batches. If MLflow refuses a batch, find the items that it refuses.

    A refused value is shortened and tried again. An item that is still refused is left out with one message.

    Args:
        items: MLflow entities of one type.
        limit: items in a batch.
        log: logs a batch.
        reported: names of items whose refusal was reported; extended.

    Raises:
        Exception: from ``log``, if it is not about single items.
    """
    for start in range(0, len(items), limit):
        batch = items[start : start + limit]
        refused = _refused(batch, log)
        if refused and len(refused) == len(batch) and refused[0][1].error_code == "BAD_REQUEST":
            raise refused[0][1]  # the error is not about the items
        for item, error in refused:
            if item.key not in reported:
                reported.add(item.key)
                kind = type(item).__name__.lower().removeprefix("run")
                why = shortened_error(error)
                print_notice(f"MLflow refuses the {kind} {printable(item.key)}, which is not recorded: {why}")


def _refused(items: Sequence[Any], log: Callable[[Sequence[Any]], object]) -> list[tuple[Any, Any]]:
    """Log ``items`` by halves; the refused ones with their errors."""
    from mlflow.exceptions import MlflowException

    try:
        log(items)
    except MlflowException as error:
        is_of_items = _TOO_LARGE in str(error) or (error.error_code in _REFUSALS and not is_permanent(error))
        if not is_of_items:
            raise
        if len(items) > 1:
            half = len(items) // 2
            return _refused(items[:half], log) + _refused(items[half:], log)
        (item,) = items
        shorter = next((limit for limit in OLDER_LIMITS if limit < len(str(item.value))), None)
        if shorter is None or not isinstance(item.value, str):
            return [(item, error)]
        return _refused([type(item)(item.key, cut(item.value, shorter))], log)
    return []


def _distinct(allowed: str, name: str) -> str:
    """Another allowed name for ``name``, if ``allowed`` is in use."""
    return f"{allowed[: LONGEST_NAME - 9]}_{_hash(name)}"


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
