"""The store that hosts share: what one writes another reads, only with the token, and only at the named address."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress

import psutil
import pytest

from cifar_exp.distributed import host_store
from cifar_exp.distributed.host_store import (
    Prefixed,
    StoreClient,
    StoreClosedError,
    StoreServer,
    TokenError,
    connected_client,
)

TOKEN = b"a token of this test"
TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from cifar_exp.distributed.host_store import Prefixed, StoreClient
from cifar_exp.distributed.rank_store import RankStore
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = RankStore(Prefixed(StoreClient(("127.0.0.1", port), sys.argv[3].encode()), "ranks-0/"), 30)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
sums = torch.full((1000,), float(rank + 1))
dist.all_reduce(sums)
dist.all_reduce(sums, group=dist.new_group([0, 1]))
print(sums.unique().tolist())
dist.destroy_process_group()
"""

LEAVING = """
import sys, time
from cifar_exp.distributed.host_store import StoreClient
client = StoreClient(("127.0.0.1", int(sys.argv[1])), sys.argv[2].encode())
client.leave_behind("gone")
print("connected", flush=True)
time.sleep(600)
"""


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with closing(StoreServer(("127.0.0.1", 0), TOKEN)) as opened:
        yield opened


def test_what_one_side_sets_the_other_reads(server: StoreServer) -> None:
    with closing(StoreClient(server.address, TOKEN)) as client:
        assert client.get("a") is None
        client.set("a", bytes(range(256)))
        assert server.get("a") == bytes(range(256))
        assert [client.add("n", 2), server.add("n", 3), client.add("n", -1)] == [2, 5, 4]
        assert not client.wait(["a", "b"], 0.05)
        threading.Timer(0.1, server.set, ("b", b"")).start()
        assert client.wait(["a", "b"], 10)
        assert client.local_address == "127.0.0.1"


def test_without_the_token_nothing_is_read(server: StoreServer) -> None:
    server.set("secret", b"x")
    with pytest.raises(TokenError):
        StoreClient(server.address, b"another")
    with socket.create_connection(server.address) as raw:
        raw.sendall(b"\0\0\0\x10" + b'["get",["secret"]')
        raw.settimeout(2)
        received = b""
        with suppress(ConnectionResetError):
            while part := raw.recv(4096):
                received += part
    assert b"secret" not in received
    assert b"eA==" not in received
    assert StoreClient(server.address, TOKEN).get("secret") == b"x"  # the server still answers


def test_a_silent_connection_does_not_keep_others_waiting(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "HANDSHAKE_SECONDS", 1)
    with socket.create_connection(server.address) as silent:
        silent.settimeout(10)
        assert StoreClient(server.address, TOKEN).get("a") is None
        while silent.recv(4096):
            pass  # the server closes it
    assert StoreClient(server.address, TOKEN).add("a", 1) == 1


@pytest.mark.parametrize("message", [b"no JSON", b'["set"]', b'["eval", ["1"]]', b"[[[[", b'{"a": 1}', b"\xff"])
def test_a_wrong_message_ends_only_its_connection(server: StoreServer, message: bytes) -> None:
    client = StoreClient(server.address, TOKEN)
    client._connection.send_bytes(message)
    with pytest.raises(StoreClosedError):
        client.get("a")
    assert StoreClient(server.address, TOKEN).get("a") is None


def test_what_a_client_leaves_behind_appears_when_it_ends_for_any_reason(server: StoreServer) -> None:
    words = [sys.executable, "-c", LEAVING, str(server.address[1]), TOKEN.decode()]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as client:
        assert client.stdout
        client.stdout.readline()
        assert server.get("gone") is None
        client.kill()
    assert server.wait(["gone"], 20)


def test_a_prefix_keeps_keys_apart_and_forgets_its_own(server: StoreServer) -> None:
    first, second = Prefixed(server, "1/"), Prefixed(server, "2/")
    first.set("a", b"x")
    assert (first.get("a"), second.get("a"), first.wait(["a"], 0), second.wait(["a"], 0)) == (b"x", None, True, False)
    second.set("a", b"y")
    server.forget("1/")
    assert (first.get("a"), second.get("a")) == (None, b"y")


def test_it_listens_on_the_named_address_only(server: StoreServer) -> None:
    mine = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in mine if address.port == server.address[1]] == ["127.0.0.1"]


def test_a_client_waits_for_a_server_that_starts_later() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = free.getsockname()
    with pytest.raises(OSError, match="refused"):
        connected_client(address, TOKEN, 0.3)
    opened: list[StoreServer] = []
    threading.Timer(0.5, lambda: opened.append(StoreServer(address, TOKEN))).start()
    with closing(connected_client(address, TOKEN, 20)) as client:
        assert client.add("n", 1) == 1
    opened[0].close()


def test_a_lost_server_is_an_error_of_its_own() -> None:
    code = (
        "import sys; from cifar_exp.distributed.host_store import StoreServer; "
        "s = StoreServer(('127.0.0.1', 0), sys.argv[1].encode()); print(s.address[1], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, TOKEN.decode()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        client = StoreClient(("127.0.0.1", int(other.stdout.readline())), TOKEN)
        other.kill()
    with pytest.raises(StoreClosedError):
        client.get("a")


def test_gloo_finds_its_ranks_through_it(server: StoreServer) -> None:
    words = [sys.executable, "-c", TWO_RANKS]
    ranks = [
        subprocess.Popen([*words, str(rank), str(server.address[1]), TOKEN.decode()], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["[6.0]\n", "[6.0]\n"]
