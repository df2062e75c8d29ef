"""Shards in a bucket of Amazon S3 or of a server with the same interface, read with boto3."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cifar_exp.data.presence import SplitName
from cifar_exp.data.shards.places import StoredFile
from cifar_exp.errors import ConfigError, DataError, MachineError
from cifar_exp.system.printable import printable

SCHEME = "s3://"
_CHUNK = 2**20  # bytes
_ATTEMPTS = 8  # of a request, with growing pauses: about half a minute; AWS_MAX_ATTEMPTS is used if set
_CONNECT, _ANSWER = 10, 60  # seconds
_ADVICE = {
    "NoSuchBucket": "there is no such bucket there. Set data.root=s3://<bucket>/<prefix>, and data.endpoint=<address "
    "of the server> unless it is Amazon's",
    "AccessDenied": "access is denied. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to credentials "
    "that may list and read it",
    "PreconditionFailed": "it was changed while it was read. Start again when it no longer changes",
    "NoSuchKey": "it was removed while it was read. Start again when the shards no longer change",
}
_DENIED = {"403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_ALIASES = {
    "404": "NoSuchKey",
    "412": "PreconditionFailed",
    "AllAccessDisabled": "AccessDenied",
    **dict.fromkeys(_DENIED, "AccessDenied"),
}


@dataclass(frozen=True)
class Bucket:
    """A prefix of a bucket.

    Attributes:
        bucket: its name.
        prefix: what the names of its objects begin with; empty or with a final ``/``.
        endpoint: address of the server; None: AWS_ENDPOINT_URL, or Amazon's.
    """

    bucket: str
    prefix: str
    endpoint: str | None

    @classmethod
    def at(cls, address: str, endpoint: str | None) -> "Bucket":
        """The bucket of ``s3://bucket/prefix``.

        Raises:
            ConfigError: the address or the endpoint has another form.
            MachineError: boto3 is not installed.
        """
        bucket, _, prefix = address.removeprefix(SCHEME).partition("/")
        if not bucket or "@" in bucket or ":" in bucket:
            raise ConfigError(
                "data.root must be s3://<bucket>/<prefix> without a password: credentials are taken from the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY). Set data.root=s3://<bucket>/<prefix>"
            )
        if endpoint is not None:
            _check_endpoint(endpoint)
        _boto3()
        return cls(bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else "", endpoint)

    @property
    def address(self) -> str:
        return printable(f"{SCHEME}{self.bucket}/{self.prefix}".rstrip("/"))

    def files(self, split: SplitName) -> list[StoredFile]:
        return self._listed(f"{self.prefix}{split}/", f"{split}/")

    def _listed(self, prefix: str, what: str) -> list[StoredFile]:
        found = []
        with self._errors(what):
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    name = entry["Key"][len(self.prefix) :]
                    if not any(part.startswith(".") or not part for part in name.split("/")):
                        found.append(StoredFile(name, entry["Size"], entry["ETag"].strip('"')))
        return sorted(found)

    def find(self, name: str) -> StoredFile | None:
        found = self._listed(f"{self.prefix}{name}", name)
        return next((file for file in found if file.name == name), None)

    def content(self, file: StoredFile) -> bytes:
        return b"".join(self._chunks(file, 0, file.size))

    def part(self, file: StoredFile, offset: int, size: int) -> bytes:
        return b"".join(self._chunks(file, offset, size))

    def local(self, file: StoredFile) -> Path | None:  # noqa: ARG002
        return None

    def download(self, file: StoredFile) -> Iterable[bytes]:
        return self._chunks(file, 0, file.size)

    def _chunks(self, file: StoredFile, offset: int, size: int) -> Iterator[bytes]:
        """A part of an object. A connection that breaks is followed by another one for the rest."""
        end, broken = min(offset + size, file.size), 0
        while offset < end:
            before = offset
            with self._errors(file.name):
                try:
                    answer = self._client().get_object(
                        Bucket=self.bucket,
                        Key=f"{self.prefix}{file.name}",
                        Range=f"bytes={offset}-{end - 1}",
                        IfMatch=file.version,
                    )
                    for chunk in answer["Body"].iter_chunks(_CHUNK):
                        offset += len(chunk)
                        yield chunk
                except _broken_bodies():
                    pass
            broken = 0 if offset > before else broken + 1
            if broken == _ATTEMPTS:
                raise self._error(file.name, "the connection breaks again and again. Start again, see docs/shards.md")

    def _client(self) -> Any:
        return _client(self.endpoint, os.getpid())

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn boto3's errors into messages."""
        from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, HTTPClientError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            code = _ALIASES.get(code, code)
            raise self._error(name, _ADVICE.get(code) or f"the server answers {printable(code)}") from error
        except (EndpointConnectionError, HTTPClientError) as error:
            raise self._error(
                name,
                f"the server {self._server()} does not answer ({type(error).__name__}). Start it, or set "
                f"data.endpoint=<address>; a run that was training continues with resume=<run folder>",
            ) from error
        except (BotoCoreError, ValueError) as error:
            raise self._error(name, f"{printable(str(error))[:300]}") from error

    def _server(self) -> str:
        return printable(self.endpoint or os.environ.get("AWS_ENDPOINT_URL") or "of Amazon")

    def _error(self, name: str, problem: str) -> DataError:
        return DataError(f"data.root={self.address}: {printable(name)}: {problem}.".replace("..", "."))


def _check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(
            "data.endpoint must be an address without a password, such as http://localhost:9000. Set "
            "data.endpoint=https://<host>, and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )


def _boto3() -> Any:
    try:
        import boto3
    except ImportError as error:
        raise MachineError(
            "data.root=s3://...: the package boto3 is missing. Run pip install 'cifar-exp[shards]'"
        ) from error
    return boto3


def _broken_bodies() -> tuple[type[Exception], ...]:
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    return (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)


@lru_cache(maxsize=2)
def _client(endpoint: str | None, _pid: int) -> Any:
    """The client of one process: connections must not be shared with the process that it was forked from."""
    from botocore import UNSIGNED
    from botocore.config import Config

    session = _boto3().session.Session()
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS") or _ATTEMPTS)
    config = Config(
        connect_timeout=_CONNECT,
        read_timeout=_ANSWER,
        max_pool_connections=32,
        retries={"mode": "standard", "total_max_attempts": attempts},
        # Without credentials only public buckets can be read; boto3 itself would refuse those, too.
        signature_version=None if session.get_credentials() else UNSIGNED,
    )
    return session.client("s3", endpoint_url=endpoint, config=config)
