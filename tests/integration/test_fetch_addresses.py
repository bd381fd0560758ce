"""tools/fetch_images.py asks public addresses alone, whatever a data set, a name server or a redirect says."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from muco_ds.errors import UserError
from muco_ds.factory import addresses
from muco_ds.factory.addresses import is_public, shown

from local_server import Answer, Request, Server
from test_fetch_images import data, failures, fetch, files, picture, served

PRIVATE = [
    *["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"],
    *["255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1"],
    *["::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "192.0.2.1"],
    *["fec0::1", "::127.0.0.1", "64:ff9b:1::7f00:1", "::ffff:0:127.0.0.1"],
]


@pytest.mark.parametrize("address", PRIVATE)
def test_no_public_address(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Host -> the addresses that a name server gives of it, one at a time."""
    given: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in given:
            return real(host, port, *args, **kwargs)
        return real(given[name].pop(0) if len(given[name]) > 1 else given[name][0], port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return given


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 is the internet; the rest of this machine is not."""
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")


def test_this_machine_is_not_asked(tmp_path: Path, names: dict[str, list[str]]) -> None:
    names["inside.test"] = ["127.0.0.1"]
    with Server(served).running() as server:
        port = server.url.rpartition(":")[2]
        hosts = ["127.0.0.1", "localhost", "inside.test", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]"]
        rows: list[tuple[str | None, str | None]] = [
            (f"{i}.jpg", f"http://{host}:{port}/") for i, host in enumerate(hosts)
        ]
        with pytest.raises(UserError, match=r"no public address \(--allow_private\)"):
            fetch(data(tmp_path, *rows, ("file.jpg", "file:///etc/passwd")), allow_private=False).run()
        assert server.requests == []
    assert failures(tmp_path) == {**{name: "address" for name, _ in rows}, "file.jpg": "url"}


def test_a_redirect_to_a_private_address_is_not_followed(tmp_path: Path, outside: None) -> None:
    def respond(request: Request) -> Answer:
        port = server.url.rpartition(":")[2]
        hops = {"/a": f"http://127.0.0.2:{port}/secret", "/b": f"http://[::1]:{port}/secret", "/c": "ftp://127.0.0.1/x"}
        return Answer(302, headers={"Location": hops[request.path]})

    with Server(respond).running() as server:
        with pytest.raises(UserError, match="no picture came"):
            fetch(data(tmp_path, *((f"{x}.jpg", f"{server.url}/{x}") for x in "abc")), allow_private=False).run()
        assert {request.path for request in server.requests} == {"/a", "/b", "/c"}
    assert failures(tmp_path) == {"a.jpg": "address", "b.jpg": "address", "c.jpg": "url"}


def test_a_name_is_resolved_once(tmp_path: Path, outside: None, names: dict[str, list[str]]) -> None:
    names["rebinding.test"] = ["127.0.0.1", "127.0.0.2"]  # the second answer is the attack
    with Server(served).running() as server:
        url = server.url.replace("127.0.0.1", "rebinding.test").replace("localhost", "rebinding.test")
        assert fetch(data(tmp_path, ("a.jpg", f"{url}/a")), allow_private=False).run() == 0
        assert server.requests[0].headers["Host"].startswith("rebinding.test:")
    assert names["rebinding.test"] == ["127.0.0.2"] and files(tmp_path / "images") == ["a.jpg"]


def test_a_proxy_is_asked_for_public_addresses_alone(
    tmp_path: Path, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names.update({"outside.test": ["8.8.8.8"], "inside.test": ["10.0.0.1"]})
    with Server(served).running() as server:
        monkeypatch.setenv("http_proxy", server.url)
        rows = [("a.jpg", "http://outside.test/a"), ("b.jpg", "http://inside.test/b")]
        assert fetch(data(tmp_path, *rows), allow_private=False).run() == 0
        assert [request.path for request in server.requests] == ["http://outside.test/a"]
    assert failures(tmp_path) == {"b.jpg": "address"}


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/html; charset=utf-8"}, {"Content-Type": "video/mp4"}, {"Content-Encoding": "gzip"}],
)
def test_what_says_it_is_no_picture_is_not_fetched(tmp_path: Path, headers: dict[str, str]) -> None:
    answers = {
        "/a": Answer(body=picture(), headers=headers),
        "/b": Answer(body=picture(), headers={"Content-Type": "image/jpeg"}),
    }
    with Server(lambda request: answers[request.path]).running() as server:
        fetch(data(tmp_path, ("a.jpg", f"{server.url}/a"), ("b.jpg", f"{server.url}/b"))).run()
        assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}
    assert failures(tmp_path) == {"a.jpg": "type"} and files(tmp_path / "images") == ["b.jpg"]


def test_what_is_secret_in_a_url_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(lambda request: Answer(404)).running() as server:
        url = server.url.replace("http://", "http://user:CANARY1@") + "/a.jpg?token=CANARY2"
        bad = "http://user:CANARY3@[::1/x.jpg?key=CANARY4"
        with pytest.raises(UserError) as error:
            fetch(data(tmp_path, ("a.jpg", url), ("b.jpg", bad)), retries=0).run()
    assert failures(tmp_path) == {"a.jpg": "http 404", "b.jpg": "url"}
    written = "".join(path.read_text() for path in tmp_path.glob("images.*"))
    output = capsys.readouterr()
    assert "CANARY" not in written + str(error.value) + output.out + output.err
    assert shown(url) == f"{server.url}/a.jpg?..." and shown(url) in written
