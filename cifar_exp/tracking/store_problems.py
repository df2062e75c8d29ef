"""Errors of the MLflow store: whether another try can help, and what the user can do."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from cifar_exp.errors import CifarExpError, TrackingError
from cifar_exp.system.bugs import described, is_bug
from cifar_exp.system.redaction import masked_text

LOGIN = (
    "The server refuses this login. Set the variables MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN, to one that may write there"
)
OTHER_SERVER = (
    "The server there is not MLflow, but perhaps a proxy's login page. Open the address in a browser, "
    "and set tracking.uri=<address of the MLflow server>"
)
UPGRADE = "Back up the store, then run mlflow db upgrade <its address>"
_LOGIN_CODES = ("CUSTOMER_UNAUTHORIZED", "UNAUTHENTICATED", "PERMISSION_DENIED")
# Part of an error's text -> what to do about it, and whether further tries are useless.
_KNOWN = (
    (r"error code 40[13]\b|40[13] Client Error", LOGIN, True),
    (r"Databricks credential|Databricks authentication", "Set DATABRICKS_HOST and DATABRICKS_TOKEN", True),
    (r"error code 407|Proxy Authentication Required", "Set https_proxy with its login, or no_proxy=<host>", False),
    (r"not in a valid JSON format|error code 40[045]\b|ENDPOINT_NOT_FOUND|^ParseError", OTHER_SERVER, False),
    (r"Exceeded \d+ redirects|INTERNAL_ERROR: Response: |names no (run|experiment)", OTHER_SERVER, False),
    (r"experiment name.* absolute path", "Set tracking.experiment=/Users/<you>/<name>", True),
    (r"(?i)invalid experiment name|experiment_?name'? exceeds", "Set tracking.experiment=<another name>", True),
    (
        r"error code 413|413 Client Error",
        "Let the server's proxy take larger requests",
        True,
    ),
    (r"CERTIFICATE_VERIFY_FAILED", "Set MLFLOW_TRACKING_SERVER_CERT_PATH=<the server's certificate>", False),
    (r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE", "Set tracking.uri=http://... in place of https://", False),
    (r"Can't locate revision", "", True),  # see _unknown_schema
    (r"out-of-date database schema", UPGRADE, True),
    (r"file is not a database|disk image is malformed", "Restore the store's file, or set another tracking.uri", True),
    (r"must be in the 'active' state", "Restore it in MLflow", True),
    (r"Invalid url|Can't load plugin: sqlalchemy", "Set tracking.uri=http://<host>:<port> or sqlite:///<file>", True),
)


def is_permanent(error: BaseException) -> bool:
    """Whether another try cannot succeed after ``error``."""
    if isinstance(error, TrackingError) or getattr(error, "error_code", None) in _LOGIN_CODES:
        return True
    return any(final for text, _, final in _KNOWN if re.search(text, _named(error)))


def advice(error: BaseException) -> str:
    """What the user can do about the error, as a sentence without its full stop; empty if unknown.

    Errors of this package already have it in their message.
    """
    if isinstance(error, CifarExpError):
        return ""
    if _unknown_schema(str(error)):  # `mlflow db upgrade` cannot help
        return "A newer MLflow has made that store. Install it here"
    if getattr(error, "error_code", None) in _LOGIN_CODES:
        return LOGIN
    return next((remedy for text, remedy, _ in _KNOWN if re.search(text, _named(error))), "")


def shortened_error(error: Exception) -> str:
    """First line of the error, at most 260 characters.

    The first 180 are kept: they contain MLflow's advice ``mlflow db upgrade``. A newer store needs different advice.
    """
    if is_bug(error):
        return described(error)
    if newer := _unknown_schema(str(error)):
        return f"the store's schema {newer} is not known to MLflow {version('mlflow')}"
    lines = masked_text(str(error).strip() or type(error).__name__).splitlines()
    text = next((line for line in lines if not line.startswith("(raised as a result of")), lines[0])
    return text if len(text) <= 260 else f"{text[:180]} ... {text[-75:]}"


@contextmanager
def store_errors(problem: str, remedy: str) -> Iterator[None]:
    """Turn an error of the store into a ``TrackingError``. Errors of this package and bugs are not changed.

    Args:
        problem: the setting, its value, and what failed.
        remedy: what to do if the error is unknown.
    """
    try:
        yield
    except CifarExpError:
        raise
    except Exception as error:  # MLflow passes on any error of its store
        if is_bug(error):
            raise
        raise TrackingError(f"{problem}: {shortened_error(error)}. {advice(error) or remedy}") from error


@contextmanager
def optional_modules(address: str) -> Iterator[None]:
    """Turn a missing driver of a database or of a cloud's storage into a ``TrackingError``.

    Args:
        address: the address that needs the driver.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("mlflow", "cifar_exp"):
            raise
        raise TrackingError(
            f"{masked_text(address)}: MLflow needs the Python module {error.name or error} for it. Install it"
        ) from error


def check_variables() -> None:
    """Check that MLflow can read its environment variables. It reads some only when a request is sent.

    Raises:
        TrackingError: one has a value of another type.
    """
    from mlflow import environment_variables

    for name in sorted(os.environ.keys() & vars(environment_variables).keys()):
        try:
            getattr(environment_variables, name).get()
        except ValueError as error:
            raise TrackingError(
                f"{name}={masked_text(os.environ[name])}: MLflow cannot read that value ({error}). Correct or unset it"
            ) from error


class NoMLflowError(Exception):
    """The answer is not from an MLflow server."""


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if type(error).__name__ == "ParseError" else str(error)


def _unknown_schema(text: str) -> str:
    """The version of a store's schema, if the error is that this MLflow does not know it; else empty."""
    found = re.search(r"database schema \(found version (\w+),|Can't locate revision identified by '(\w+)'", text)
    if not found:
        return ""
    import mlflow

    revision = found[1] or found[2]
    known = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    return "" if revision == "None" or any(known.glob(f"{revision}_*.py")) else revision
