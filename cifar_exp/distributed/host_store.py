"""A key-value store that several hosts share. Every connection proves that it knows the token.

torch's own TCPStore listens on all interfaces and lets anybody read and write. Here host 0 listens on one address only.
Each message is JSON of bounded size; nothing is unpickled. The connections are authenticated, not encrypted.
"""

import base64
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, Protocol

MOST_BYTES = 2**24  # of one message
HANDSHAKE_SECONDS = 5.0
CONNECT_SECONDS = 5.0
_ENDING = (OSError, EOFError, ValueError, TypeError, AuthenticationError)  # a closed connection, or a wrong message


class StoreClosedError(ConnectionError):
    """The other side has closed the connection, or does not answer."""


class TokenError(Exception):
    """The two sides have different tokens."""


class HostStore(Protocol):
    """What both sides can do. The other hosts' side raises ``StoreClosedError`` if host 0 cannot be reached."""

    def set(self, key: str, value: bytes) -> None:
        """Give ``key`` a value."""

    def get(self, key: str) -> bytes | None:
        """The value of ``key``; None if it has none."""

    def add(self, key: str, amount: int) -> int:
        """Add to the whole number that ``key`` holds (0 if it has none). Returns the sum."""

    def wait(self, keys: list[str], seconds: float) -> bool:
        """Wait until all ``keys`` have values. Returns whether they have."""


@dataclass(frozen=True)
class Prefixed:
    """A store with a prefix before every key."""

    store: HostStore
    prefix: str

    def set(self, key: str, value: bytes) -> None:
        self.store.set(self.prefix + key, value)

    def get(self, key: str) -> bytes | None:
        return self.store.get(self.prefix + key)

    def add(self, key: str, amount: int) -> int:
        return self.store.add(self.prefix + key, amount)

    def wait(self, keys: list[str], seconds: float) -> bool:
        return self.store.wait([self.prefix + key for key in keys], seconds)


class StoreServer:
    """Host 0's side. Its own reads and writes need no connection."""

    def __init__(self, address: tuple[str, int], token: bytes) -> None:
        """Listen on ``address`` (host, port); port 0 takes any free one.

        Raises:
            OSError: the address is not one of this host's, or is in use.
        """
        self._token, self._values = token, dict[str, bytes]()
        self._changed = threading.Condition()
        self._listener = socket.create_server(address, backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, name="host store", daemon=True).start()

    def close(self) -> None:
        """Stop listening. Connections end with this process or with the other side."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes | None:
        """The value of ``key``; None if it has none."""
        with self._changed:
            return self._values.get(key)

    def add(self, key: str, amount: int) -> int:
        """Add to the whole number that ``key`` holds (0 if it has none). Returns the sum."""
        with self._changed:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            self._changed.notify_all()
            return total

    def wait(self, keys: list[str], seconds: float) -> bool:
        """Wait until all ``keys`` have values. Returns whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: all(key in self._values for key in keys), seconds)

    def forget(self, prefix: str) -> None:
        """Remove all keys that start with ``prefix``."""
        with self._changed:
            self._values = {key: value for key, value in self._values.items() if not key.startswith(prefix)}

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:  # closed
                    return
                time.sleep(0.1)  # too many open files
                continue
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        left_behind: list[str] = []
        with (
            suppress(OSError, EOFError, ValueError, TypeError, AuthenticationError),
            _connection(accepted) as connection,
        ):
            with _limited_time(connection):
                deliver_challenge(connection, self._token)
                answer_challenge(connection, self._token)
            while True:
                operation, arguments = json.loads(connection.recv_bytes(MOST_BYTES))
                if operation == "leave":
                    left_behind.append(str(arguments[0]))
                    answer = None
                else:
                    answer = self._answer(operation, *arguments)
                connection.send_bytes(json.dumps(answer).encode())
        for key in left_behind:
            self.set(key, b"")

    def _answer(self, operation: str, *arguments: Any) -> Any:
        if operation == "set":
            key, value = arguments
            return self.set(str(key), base64.b64decode(value))
        if operation == "get":
            value = self.get(str(arguments[0]))
            return None if value is None else base64.b64encode(value).decode()
        if operation == "add":
            return self.add(str(arguments[0]), int(arguments[1]))
        if operation == "wait":
            return self.wait([str(key) for key in arguments[0]], min(float(arguments[1]), 3600.0))
        raise ValueError(operation)


class StoreClient:
    """The side of the other hosts, and of all ranks. Calls from several threads take turns.

    Every method raises ``StoreClosedError`` if host 0 cannot be reached any more.
    """

    def __init__(self, address: tuple[str, int], token: bytes, answer_seconds: float | None = None) -> None:
        """Connect to host 0.

        Args:
            address: host and port.
            token: the secret that all hosts know.
            answer_seconds: how long host 0 may take for an answer; None: as long as it likes.

        Raises:
            OSError: nobody listens at ``address``.
            TokenError: host 0 has another token.
        """
        connected = socket.create_connection(address, timeout=CONNECT_SECONDS)
        self.local_address: str = connected.getsockname()[0]
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._turn = Connection(connected.detach()), threading.Lock()
        try:
            with _limited_time(self._connection):
                answer_challenge(self._connection, token)
                deliver_challenge(self._connection, token)
        except AuthenticationError as error:
            raise TokenError from error
        except (EOFError, OSError) as error:
            raise StoreClosedError(str(error)) from error
        if answer_seconds:
            _limit_time(self._connection, int(answer_seconds))

    def set(self, key: str, value: bytes) -> None:
        self._ask("set", key, base64.b64encode(value).decode())

    def get(self, key: str) -> bytes | None:
        """The value of ``key``; None if it has none."""
        value = self._ask("get", key)
        return None if value is None else base64.b64decode(value)

    def add(self, key: str, amount: int) -> int:
        """Add to the whole number that ``key`` holds (0 if it has none). Returns the sum."""
        return int(self._ask("add", key, amount))

    def wait(self, keys: list[str], seconds: float) -> bool:
        """Wait until all ``keys`` have values. Returns whether they have."""
        return bool(self._ask("wait", keys, seconds))

    def leave_behind(self, key: str) -> None:
        """Give ``key`` an empty value when this connection ends, for any reason."""
        self._ask("leave", key)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        with self._turn:
            try:
                self._connection.send_bytes(json.dumps((operation, arguments)).encode())
                return json.loads(self._connection.recv_bytes(2 * MOST_BYTES))
            except (OSError, EOFError) as error:
                self._connection.close()  # a late answer would be taken for that of the next question
                raise StoreClosedError(str(error)) from error

    def close(self) -> None:
        self._connection.close()


def connected_client(
    address: tuple[str, int], token: bytes, seconds: float, answer_seconds: float | None = None
) -> StoreClient:
    """Connect to host 0, which may start later.

    Raises:
        OSError: nobody has listened at ``address`` for ``seconds``.
        TokenError: host 0 has another token.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return StoreClient(address, token, answer_seconds)
        except OSError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.2)


@contextmanager
def _connection(accepted: socket.socket) -> Iterator[Connection]:
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with Connection(accepted.detach()) as connection:
        yield connection


@contextmanager
def _limited_time(connection: Connection) -> Iterator[None]:
    """Inside this context a read or write of more than ``HANDSHAKE_SECONDS`` raises OSError."""
    _limit_time(connection, int(HANDSHAKE_SECONDS))
    try:
        yield
    finally:
        with suppress(OSError):  # it was closed
            _limit_time(connection, 0)


def _limit_time(connection: Connection, seconds: int) -> None:
    limit = struct.pack("ll", seconds, 0)
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
