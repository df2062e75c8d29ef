"""The types of the facts in ``run.json``, ``sweep_run.json`` and ``outcome.json``, which are untrusted."""

from pathlib import PurePath
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cifar_exp.system.printable import printable

Seconds = Annotated[float, Field(ge=0, lt=2**40)]  # also since the epoch


def _file_name(name: str) -> str:
    """``name``, if it names a file of the folder itself."""
    if PurePath(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError("it must be the name of a file in the folder, without a path")
    return name


class Origin(TypedDict):
    """The checkpoint of another run that a run started from."""

    folder: str
    step: int


class RunFacts(TypedDict):
    """``run.json`` and ``sweep_run.json``. Later versions may add facts: those are ignored."""

    name: str
    params: dict[str, Any]
    tags: dict[str, str]
    started: NotRequired[Seconds]
    artifacts: NotRequired[list[Annotated[str, AfterValidator(_file_name)]]]
    sweep_dir: NotRequired[str]
    origin: NotRequired[Origin]
    key: NotRequired[Annotated[str, Field(pattern=r"^[\w-]{0,64}$")]]
    config_hash: NotRequired[str | None]
    config_hashes: NotRequired[list[str | None]]
    sessions: NotRequired[list[str]]


class OutcomeFacts(TypedDict):
    """``outcome.json``."""

    status: Literal["FINISHED", "FAILED", "KILLED"]
    ended: Seconds


RUN_FACTS = TypeAdapter(RunFacts)
OUTCOME_FACTS = TypeAdapter(OutcomeFacts)


def reason(error: Exception) -> str:
    """Why facts were refused, in one line: pydantic's first problem, or the text of another error."""
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors(include_url=False)[0]
    value = printable(problem["input"])
    where = ".".join(map(str, problem["loc"])) or "it"
    return f"{where}={value[:80]}{'...' if len(value) > 80 else ''}: {problem['msg']}"
