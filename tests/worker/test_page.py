"""The worker's page: who gets in, what a request may be, and that orders arrive."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_control import STATUS
from typer.testing import CliRunner

from rankup.cli.volunteer import app
from rankup.errors import SetupError, StateError
from worker import page
from worker.control import MAX_REQUEST_BYTES, ControlServer, Reply, Request, socket_path
from worker.limits import Limits
from worker.limitwords import LIMIT_WORDS
from worker.page import PageServer, Scene
from worker.pagekey import CODE_S, FILE_NAME, Door, make_code, open_key


class Owner:
    """A page with an agent behind it that remembers its orders, and a browser of the person who may use it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.orders: list[Request] = []
        self.server = PageServer(home, 0, self.obey, lambda: Scene(status=STATUS, curve=((1, 2.5),), journal=("a",)))
        self.port = self.server.port
        self.host = f"127.0.0.1:{self.port}"
        self.door = Door(open_key(home), self.port)
        self.cookie = f"{self.door.cookie_name}={self.door.cookie}"

    def obey(self, request: Request) -> Reply:
        self.orders.append(request)
        return Reply(status=STATUS)

    def send(
        self, method: str, path: str, body: bytes | None = None, **headers: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """What comes back; `headers` replace those of the page itself, or take them away."""
        usual: dict[str, str | None] = {"Host": self.host, "Cookie": self.cookie}
        if body is not None:
            usual |= {"Origin": f"http://{self.host}", "Content-Type": "application/json", "Content-Length": None}
        chosen = usual | {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as line:
            line.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            if body is not None and chosen.pop("Content-Length", None) is None:
                line.putheader("Content-Length", str(len(body)))
            for name, value in chosen.items():
                if value is not None:
                    line.putheader(name, value)
            line.endheaders(body)
            answer = line.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def order(self, **fields: Any) -> tuple[int, dict[str, str], bytes]:
        return self.send("POST", "/order", json.dumps(fields).encode())


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    there = Owner(tmp_path)
    with there.server:
        yield there


# -- who gets in -------------------------------------------------------------------------------------------------------


def test_a_code_opens_the_page_once_and_leaves_a_cookie_that_no_script_and_no_other_site_can_use(owner: Owner) -> None:
    path = f"/?code={make_code(open_key(owner.home), owner.port, time.time())}"
    status, headers, body = owner.send("GET", path, Cookie=None)
    assert (status, b"refresh" in body) == (200, True)
    pair, *attributes = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert owner.send("GET", "/", Cookie=pair)[2].startswith(b"<!doctype html>")
    assert owner.send("GET", "/scene", Cookie=f'session="strange,=\\";;; other=1; {pair}')[0] == 200
    assert owner.send("GET", path, Cookie=None)[0] == 401


def test_a_code_is_for_one_page_one_key_and_a_few_minutes(tmp_path: Path) -> None:
    key, now = open_key(tmp_path), [1e9]
    door = Door(key, 7420, lambda: now[0])
    wrong = (make_code(key, 7421, 1e9), make_code(b"x" * 32, 7420, 1e9), make_code(key, 7420, 1e9 - CODE_S), "", "a-b")
    assert [door.open_with(code) for code in wrong] == [False] * 5
    code = make_code(key, 7420, 1e9)
    assert not door.open_with(str(int(code.partition("-")[0]) + 999) + "-" + code.partition("-")[2])
    now[0] += CODE_S - 1
    assert door.open_with(code)
    assert not door.open_with(code)
    now[0] += 1
    assert not door.open_with(code)
    assert not door.open_with(make_code(key, 7420, 1e9))


def test_the_key_is_its_owners_and_stays_the_same(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(open_key(tmp_path / "home"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {open_key(tmp_path / "home")}
    assert [path.name for path in (tmp_path / "home").iterdir()] == [FILE_NAME]
    assert stat.S_IMODE((tmp_path / "home" / FILE_NAME).stat().st_mode) == 0o600
    (tmp_path / "home" / FILE_NAME).write_bytes(b"short")
    with pytest.raises(SetupError, match="not a key"):
        open_key(tmp_path / "home")


@pytest.mark.parametrize("path", ["/", "/scene", "/limits", "/../page.key", "/page.html", "//"])
@pytest.mark.parametrize("cookie", [None, "", "rankup-{port}=", "rankup-{port}={wrong}", "rankup-1={right}"])
def test_nothing_is_shown_without_the_cookie(owner: Owner, path: str, cookie: str | None) -> None:
    if cookie is not None:
        cookie = cookie.format(port=owner.port, wrong="0" * 64, right=owner.door.cookie)
    status, _, body = owner.send("GET", path, Cookie=cookie)
    assert (status, b"rankup worker page" in body) == (401, True)
    assert owner.send("POST", "/order", b'{"order": "leave"}', Cookie=cookie)[0] == 401
    assert owner.orders == []


@pytest.mark.parametrize("host", [None, "", "evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1"])
def test_no_other_name_leads_to_the_page(owner: Owner, host: str | None) -> None:
    host = host.format(port=owner.port) if host is not None else None
    for path in ("/", "/scene", "/page.js"):
        assert owner.send("GET", path, Host=host)[0] == 403
    assert owner.send("POST", "/order", b'{"order": "leave"}', Host=host, Origin=f"http://{host}")[0] == 403
    assert owner.orders == []
    assert owner.send("GET", "/", Host=f"localhost:{owner.port}")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://127.0.0.1:1"},
        {"Content_Type": "text/plain"},
        {"Content_Type": None},
    ],
)
def test_an_order_comes_from_the_page_itself(owner: Owner, headers: dict[str, str | None]) -> None:
    assert owner.send("POST", "/order", b'{"order": "leave"}', **headers)[0] in (403, 415)
    assert owner.orders == []


# -- what a request may be ---------------------------------------------------------------------------------------------


def test_orders_are_those_of_the_control_socket(owner: Owner) -> None:
    status, _, body = owner.order(order="pause", seconds=1200)
    assert (status, Reply.model_validate_json(body)) == (200, Reply(status=STATUS))
    owner.order(order="limits", changes=["nice=19"])
    assert owner.orders == [Request(order="pause", seconds=1200), Request(order="limits", changes=("nice=19",))]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/order", b"", 400),
        ("POST", "/order", b'{"order": "rm"}', 400),
        ("POST", "/order", b'{"order": "pause", "seconds": -1}', 400),
        ("POST", "/order", b" " * (MAX_REQUEST_BYTES + 1), 413),
        ("POST", "/", b'{"order": "leave"}', 404),
        ("GET", "/order", None, 404),
        ("GET", "/order?order=leave", None, 404),
        ("GET", "/page.key", None, 404),
        ("GET", "/..%2fpage.key", None, 404),
        ("PUT", "/order", b'{"order": "leave"}', 501),
        ("OPTIONS", "/order", None, 501),
        ("BREW", "/", None, 501),
    ],
)
def test_what_is_no_order_changes_nothing(
    owner: Owner, method: str, path: str, body: bytes | None, status: int
) -> None:
    assert owner.send(method, path, body)[0] == status
    assert owner.orders == []


@pytest.mark.parametrize("length", ["-1", "+5", "1e3", "9" * 30, "٣"])
def test_a_length_that_is_none_is_an_empty_order(owner: Owner, length: str) -> None:
    with socket.create_connection(("127.0.0.1", owner.port), timeout=10) as line:
        line.sendall(
            f"POST /order HTTP/1.1\r\nHost: {owner.host}\r\nOrigin: http://{owner.host}\r\nCookie: {owner.cookie}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()
        )
        assert line.recv(100).split()[1] == b"400"
    assert owner.orders == []


def answered_soon(owner: Owner) -> bool:
    """Whether the page answers as soon as the threads of the closed connections have ended."""
    for _ in range(100):
        with contextlib.suppress(ConnectionError):
            return owner.send("GET", "/scene")[0] == 200
        time.sleep(0.05)
    return False


def test_who_hangs_or_talks_without_end_holds_up_nobody(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", owner.port), timeout=10)

    lines = [connect() for _ in range(page.MAX_CONNECTIONS)]
    for line in lines[1:]:
        line.sendall(f"POST /order HTTP/1.1\r\nHost: {owner.host}\r\nContent-Length: 900\r\n\r\n{{".encode())
    with closing(connect()) as refused:
        assert refused.recv(100) == b""
    lines[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        lines[0].recv(100)
    lines[0].settimeout(10)
    monkeypatch.setattr(page, "DEADLINE_S", 0.4)
    began = time.monotonic()
    for line in lines:
        while line.recv(4096):
            pass
        line.close()
    assert time.monotonic() - began < 3
    assert answered_soon(owner)
    with closing(connect()) as endless:
        endless.sendall(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n")
        assert endless.recv(100).split()[1] == b"414"
    assert owner.orders == []


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere_and_nobody_may_frame_it(owner: Owner) -> None:
    for path in ("/", "/page.css", "/page.js", "/scene"):
        status, headers, body = owner.send("GET", path)
        assert status == 200
        rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert (rules["default-src"], rules["frame-ancestors"], rules["script-src"]) == ("'none'", "'none'", "'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
        assert b"https://" not in body
        assert set(re.findall(rb"http://[\w./]+", body)) <= {b"http://www.w3.org/2000/svg", b"http://h"}
    markup = owner.send("GET", "/")[2].decode()
    assert re.findall(r'(?:src|href)="([^"]*)"', markup) == ["data:,", "page.css", "page.js"]
    assert " style=" not in markup
    assert " on" not in re.sub(r">[^<]*<", "><", markup)


def test_every_element_that_the_script_asks_for_is_on_the_page(owner: Owner) -> None:
    markup, script = (owner.send("GET", path)[2].decode() for path in ("/", "/page.js"))
    wanted = set(re.findall(r"(?:\bat|\bput|\blines)\(\"([\w-]+)\"", script))
    assert len(wanted) > 25
    assert wanted <= set(re.findall(r'id="([\w-]+)"', markup))
    assert "innerHTML" not in script


def test_the_scene_is_the_status_with_curve_and_journal(owner: Owner) -> None:
    scene = Scene.model_validate_json(owner.send("GET", "/scene")[2])
    assert (scene.status, scene.curve, scene.journal) == (STATUS, ((1, 2.5),), ("a",))


def test_every_limit_has_its_words(owner: Owner) -> None:
    shown = json.loads(owner.send("GET", "/limits")[2])
    assert sorted(words["name"] for words in shown) == sorted(Limits.model_fields)
    kinds = {"bool": "switch", "float": "number", "int": "number", "tuple": "programs", "dict": "week"}
    assert {words.name: words.kind for words in LIMIT_WORDS} == {
        name: kinds[type(value).__name__] for name, value in Limits()
    }


# -- where it is -------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_passed_over(tmp_path: Path, owner: Owner) -> None:
    with PageServer(tmp_path, owner.port, owner.obey, lambda: Scene(status=STATUS)) as second:
        assert owner.port < second.port <= owner.port + 20 or second.port > 1024
        assert second.port != owner.port
        assert second.address == f"http://127.0.0.1:{second.port}/"


def test_the_command_prints_an_address_that_opens_the_page(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKUP_WORKER_HOME", str(owner.home))
    shown = [STATUS.model_copy(update={"page": owner.server.address}), STATUS]
    with ControlServer(socket_path(owner.home, "http://h"), lambda request: Reply(status=shown[0])):
        assert owner.server.address in CliRunner().invoke(app, ["status"]).output
        address = CliRunner().invoke(app, ["page"]).output.strip()
        assert address.startswith(owner.server.address)
        assert owner.send("GET", address.removeprefix(owner.server.address[:-1]), Cookie=None)[0] == 200
        shown.pop(0)
        assert isinstance(CliRunner().invoke(app, ["page"]).exception, StateError)
