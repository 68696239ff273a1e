"""What stands before the app, around a real server and over real sockets."""

import asyncio
import gzip
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from asgi import Running, everything, parsed, running

from star_elastic.serve.guard import Connections, Deadlines, allow_files, guarded
from star_elastic.serve.guard.asgi import Receive, Scope, Send
from star_elastic.serve.guard.body import Body
from star_elastic.serve.keys import Key, Keys, digest_of

KEYS = Keys(
    [
        Key(name="user", sha256=digest_of("se-user")),
        Key(name="root", sha256=digest_of("se-root"), admin=True),
    ]
)
USER, ROOT = ({"Authorization": f"Bearer {key}"} for key in ("se-user", "se-root"))
LIMIT = 100_000  # bytes of a body
CHUNKED = (
    b"POST / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer se-user\r\n"
    b"Content-Type: application/json\r\nConnection: close\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Says what it was asked, once the whole body is there."""
    if scope["type"] == "lifespan":
        for _ in range(2):
            name = (await receive())["type"]
            await send({"type": f"{name}.complete"})
        return
    size, messages, more = 0, 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, messages = size + len(message.get("body", b"")), messages + 1
        more = message.get("more_body", False)
    key = scope.get("state", {}).get("key")
    said = {"path": scope["path"], "size": size, "messages": messages, "key": key and key.name}
    body = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    app = guarded(
        echo,
        KEYS,
        hosts=("localhost", "models.example", "other.example:444"),
        origins=("https://chat.example",),
        max_body_bytes=LIMIT,
        body_seconds=0.5,
    )
    with running(app) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, headers=USER) as client:
        yield client


def refused(response: httpx2.Response, status: int, code: str | None = None) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    return error["message"]


def test_a_body_comes_whole(client: httpx2.Client) -> None:
    def slices() -> Iterator[bytes]:
        for _ in range(10):
            yield b"x" * (LIMIT // 10)

    json_type = {"Content-Type": "application/json; charset=UTF-8"}
    for content in (b"x" * LIMIT, slices(), b""):
        said = client.post("/v1/x", content=content, headers=json_type).json()
        assert said["messages"] == 1 and said["size"] in (LIMIT, 0)
    assert client.post("/v1/x").json()["size"] == 0  # nothing sent needs no type


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [LIMIT + 1, 300 * LIMIT])
def test_a_body_that_is_too_long(client: httpx2.Client, size: int, chunked: bool) -> None:
    content = iter([b"x" * 2**16] * (size // 2**16 + 1)) if chunked else b"x" * size
    begin = time.monotonic()
    response = client.post("/", content=content, headers={"Content-Type": "application/json"})
    assert str(LIMIT) in refused(response, 413, "request_too_large")
    assert time.monotonic() - begin < 5


def test_who_sends_all_before_reading_is_answered_too(server: Running) -> None:
    for key in (b"se-user", b"wrong"):
        with server.dial() as connection:
            head = CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 9999999")
            connection.sendall(head.replace(b"se-user", key))
            connection.sendall(b"x" * 9_999_999)  # an answer that is reset would fail here
            assert parsed(everything(connection))[0] == (413 if key == b"se-user" else 401)


def test_a_length_is_refused_before_the_body_comes(server: Running) -> None:
    with server.dial() as connection:
        connection.sendall(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer se-user\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99999999\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        status, said = parsed(everything(connection))
    assert status == 413 and said["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=application/json"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/jsonx"},
        {},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "application/json", "Content-Encoding": "identity, br"},
    ],
)
def test_a_body_of_something_else(client: httpx2.Client, headers: dict[str, str]) -> None:
    bomb = gzip.compress(b"0" * 10**6)
    assert refused(client.post("/", content=bomb, headers=headers), 415, "unsupported_media_type")


def test_a_slow_body(server: Running) -> None:
    with server.dial() as connection:
        connection.sendall(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer se-user\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        begin = time.monotonic()
        drip(connection)
        status, said = parsed(everything(connection))
    assert status == 408 and "within 0.5 s" in said["error"]["message"]
    assert 0.4 < time.monotonic() - begin < 4


def drip(connection: socket.socket, seconds: float = 5.0) -> None:
    """Send a byte now and then, in a thread, until the server has had enough."""

    def dripping() -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                connection.sendall(b"x")
            except OSError:
                return
            time.sleep(0.05)

    threading.Thread(target=dripping, daemon=True).start()


def test_many_bodies_at_once_have_a_limit_together() -> None:
    """Two of 600 bytes at a time are received where 1,000 are the most."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> None:
        body = Body(echo, max_bytes=900, seconds=5, max_together=1000)
        more = asyncio.Event()
        scope = {"type": "http", "method": "POST", "path": "/", "headers": JSON_HEADERS}

        async def first() -> Any:
            if pieces:
                return pieces.pop()
            await more.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        pieces = [{"type": "http.request", "body": b"x" * 600, "more_body": True}]
        held = asyncio.create_task(body(scope, first, send))
        await asyncio.sleep(0.01)
        others = [{"type": "http.request", "body": b"x" * 600, "more_body": False}] * 3

        async def second() -> Any:
            return others.pop()

        await body(scope, second, send)
        assert sent[0]["status"] == 503 and (b"retry-after", b"1") in sent[0]["headers"]
        sent.clear()
        more.set()
        await held
        assert sent[0]["status"] == 200
        sent.clear()
        await body(scope, second, send)
        assert sent[0]["status"] == 200

    asyncio.run(main())


def test_a_body_that_no_header_announced() -> None:
    """As other servers than ours may hand it over, of HTTP/2."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Body(echo)(scope, receive, send))
    assert sent[0]["status"] == 415


JSON_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"600")]


def test_headers_are_counted_and_measured(client: httpx2.Client) -> None:
    assert client.get("/", headers={f"x-{i}": "y" for i in range(80)}).status_code == 200
    many = {f"x-{i}": "y" for i in range(101)}
    refused(client.get("/", headers=many), 431, "headers_too_large")
    refused(client.get("/", headers={"x": "y" * 33_000}), 431)
    refused(client.get("/?" + "y" * 33_000), 431)


def test_headers_without_end(server: Running) -> None:
    with server.dial() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(40):
            try:
                connection.sendall(b"x-filler: " + b"y" * 1000 + b"\r\n")
            except OSError:
                break
            time.sleep(0.002)
        assert parsed(everything(connection))[0] == 431


@pytest.mark.parametrize(
    "line",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"],
)
def test_what_is_no_request(server: Running, line: bytes) -> None:
    with server.dial() as connection:
        connection.sendall(line)
        status, said = parsed(everything(connection))
    assert status == 400 and said["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        (b"ZZ\r\n", 400),
        (b"1\r\nx\r\n" * 500 + b"0\r\n\r\n", 200),
        (b"1\r\nx\r\n" * 2000, 400),  # each costs the server more than the client
        ((b"400\r\n" + b"x" * 1024 + b"\r\n") * 90 + b"0\r\n\r\n", 200),
    ],
    ids=["broken", "some", "tiny", "large"],
)
def test_chunks(server: Running, chunks: bytes, status: int) -> None:
    with server.dial() as connection:
        connection.sendall(CHUNKED + chunks)
        assert parsed(everything(connection))[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("localhost.", 200),
        ("models.example:8000", 200),
        ("other.example:444", 200),
        ("127.0.0.1:8000", 200),
        ("10.1.2.3", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("other.example", 403),
        ("other.example:445", 403),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example#localhost", 403),
        ("localhost@evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_only_our_names_are_served(client: httpx2.Client, host: str, status: int) -> None:
    response = client.get("/", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        refused(response, 403, "host_not_allowed")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://models.example:8000", 200),
        ("https://models.example:8000", 200),  # of a proxy that speaks TLS
        ("https://chat.example", 200),
        ("http://chat.example", 403),
        ("https://chat.example.evil.example", 403),
        ("http://models.example", 403),
        ("http://models.example:8001", 403),
        ("http://evil.example", 403),
        ("http://x@models.example:8000", 403),
        ("http://models.example:8000x", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_only_our_pages_may_ask(client: httpx2.Client, origin: str, status: int) -> None:
    headers = {"Host": "models.example:8000", "Origin": origin}
    response = client.get("/", headers=headers)
    assert response.status_code == status
    if status == 403:
        refused(response, 403, "origin_not_allowed")
    crossed = response.headers.get("access-control-allow-origin")
    assert crossed == (origin if origin == "https://chat.example" else None)


def test_an_origin_that_is_no_host_either(client: httpx2.Client) -> None:
    refused(client.get("/", headers={"Host": "localhost:x", "Origin": "null"}), 403)


def test_a_listed_page_is_told_that_it_may(server: Running) -> None:
    asks = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    response = httpx2.options(f"{server.url}/v1/x", headers=asks)  # browsers send no key with it
    assert response.status_code == 204 and response.headers["vary"] == "origin"
    assert "authorization" in response.headers["access-control-allow-headers"]
    other = httpx2.options(f"{server.url}/v1/x", headers={**asks, "Origin": "http://e.example"})
    assert "access-control-allow-origin" not in other.headers
    assert refused(other, 403)


def test_every_path_but_the_open_one_needs_a_key(server: Running) -> None:
    for path in ("/", "/v1/models", "/metrics", "/nowhere", "/health/", "/health/x", "//health",
                 "/admin", "/Health", "/health%2f..%2fv1", "/docs", "/openapi.json"):  # fmt: skip
        for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD"):
            response = httpx2.request(method, server.url + path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
    refused(response := httpx2.get(server.url + "/x"), 401, "invalid_api_key")
    assert response.json()["error"]["message"].startswith("no API key")
    assert httpx2.get(server.url + "/health").json()["key"] is None


@pytest.mark.parametrize(
    "value",
    ["se-user", "Basic se-user", "Bearer", "Bearer x", "Bearer se-user x", "Bearer é"],
)
def test_keys_that_are_none(server: Running, value: str) -> None:
    headers = {b"Authorization": value.encode("latin-1")}
    message = refused(httpx2.get(server.url, headers=headers), 401, "invalid_api_key")
    assert message.startswith("this API key is not known") and "se-user" not in message


def test_two_keys_are_none(server: Running) -> None:
    headers = [("Authorization", "Bearer se-user"), ("Authorization", "Bearer se-root")]
    refused(httpx2.get(server.url, headers=headers), 401)


def test_whose_key_it_is(server: Running) -> None:
    assert httpx2.get(server.url, headers=USER).json()["key"] == "user"
    assert httpx2.get(server.url, headers={"authorization": "bearer se-root"}).json()["key"]
    for path in ("/admin", "/admin/", "/admin/load", "//admin", "/ADMIN", "/%61dmin", "/admin%2Fx"):
        refused(httpx2.get(server.url + path, headers=USER), 403, "admin_only")
        assert httpx2.get(server.url + path, headers=ROOT).json()["key"] == "root"
    assert httpx2.get(server.url + "/administer", headers=USER).status_code == 200


def test_a_refused_body_is_not_read(server: Running) -> None:
    begin = time.monotonic()
    response = httpx2.post(server.url, content=b"x" * 10**7)
    refused(response, 401)
    assert response.headers["connection"] == "close" and time.monotonic() - begin < 5


@pytest.mark.parametrize("open_admin", [False, True])
def test_without_keys(open_admin: bool) -> None:
    with running(guarded(echo, None, open_admin=open_admin)) as server:
        assert httpx2.get(server.url + "/v1/x").json()["key"] is None
        assert httpx2.get(server.url + "/admin/x").status_code == (200 if open_admin else 403)


def test_headers_of_every_answer(server: Running, client: httpx2.Client) -> None:
    for response in (
        client.get("/"),
        httpx2.get(server.url),
        client.get("/", headers={"Host": "e"}),
    ):
        headers = response.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_slow_headers() -> None:
    with running(guarded(echo, None), Deadlines(request=0.4)) as server:
        with server.dial() as connection:
            begin = time.monotonic()
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nx: ")
            drip(connection)
            status, said = parsed(everything(connection))
            assert status == 408 and "within 0.4 s" in said["error"]["message"]
            assert 0.3 < time.monotonic() - begin < 4
        with server.dial() as connection:  # the next request on a connection as well
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            begin = time.monotonic()
            connection.sendall(b"GET / HT")
            assert b" 408 " in everything(connection)
            assert 0.3 < time.monotonic() - begin < 4
        with server.dial() as connection:  # and one that says nothing
            assert everything(connection) == b""


def test_a_slow_body_where_nothing_else_bounds_it() -> None:
    with running(echo, Deadlines(request=0.3)) as server, server.dial() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        begin = time.monotonic()
        drip(connection)
        assert everything(connection) == b""
        assert 1.0 < time.monotonic() - begin < 4


def test_an_answer_may_take_longer_than_the_request() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0 if scope["type"] == "lifespan" else 0.8)
        await echo(scope, receive, send)

    with running(guarded(slow, None), Deadlines(request=0.3)) as server:
        pipelined = b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with server.dial() as connection:
            connection.sendall(pipelined % 1 + pipelined % 2)
            received = everything(connection)
        assert received.count(b"HTTP/1.1 200") == 2 and b'"/2"' in received
        assert server.connections.count == 0


def test_idle_connections_give_way() -> None:
    """2,000 that only connect, where 500 are allowed; then as many as are allowed."""
    if allow_files(6000) < 5000:
        pytest.skip("too few open files allowed")
    for most, left in ((500, 500), (3000, 2001)):
        connections = Connections(most, per_address=None)
        with running(guarded(echo, None), connections=connections) as server:
            idle = [server.dial() for _ in range(2000)]
            begin = time.monotonic()
            assert httpx2.get(server.url).status_code == 200
            assert time.monotonic() - begin < 4
            assert left - 1 <= connections.count <= left
            for connection in idle:
                connection.close()


def test_connections_of_one_address() -> None:
    release = threading.Event()

    async def held(scope: Scope, receive: Receive, send: Send) -> None:
        while scope["type"] == "http" and scope["path"] == "/held" and not release.is_set():
            await asyncio.sleep(0.01)
        await echo(scope, receive, send)

    with running(guarded(held, None), connections=Connections(9, per_address=3)) as server:
        busy = [server.dial() for _ in range(3)]
        for connection in busy:
            connection.sendall(b"GET /held HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.1)
        with server.dial() as one_more:
            status, said = parsed(everything(one_more))
            assert status == 503 and said["error"]["type"] == "server_error"
        with server.dial("127.0.0.2") as other:
            other.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert parsed(everything(other))[0] == 200
        release.set()
        for connection in busy:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        with server.dial() as next_one:  # those three wait now, and one of them gives way
            next_one.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert parsed(everything(next_one))[0] == 200
        for connection in busy:
            connection.close()


def test_limits_that_are_none() -> None:
    for limits in ((0, 1), (1, 0), (-1, None)):
        with pytest.raises(ValueError, match="not positive"):
            Connections(*limits)


def test_a_reader_who_stops_costs_no_memory_and_is_left() -> None:
    sent, ended = [0], threading.Event()

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/stream":
            await echo(scope, receive, send)
            return
        await receive()
        left = asyncio.ensure_future(receive())
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not left.done():
            await send({"type": "http.response.body", "body": b"x" * 4096, "more_body": True})
            sent[0] += 4096
            await asyncio.sleep(0)
        ended.set()

    with running(guarded(stream, None), Deadlines(stall=1.0)) as server:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with server.dial() as connection:
            connection.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.5)
            stopped = sent[0]
            assert httpx2.get(server.url).status_code == 200  # nobody else waits for it
            time.sleep(0.2)
            assert sent[0] - stopped < 2**20 and stopped < 16 * 2**20  # the kernel's buffers
            assert ended.wait(8)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
    assert server.connections.count == 0


_ATTACK = """
import socket, sys, threading, time

START = b"POST / HTTP/1.1\\r\\nHost: localhost\\r\\nAuthorization: Bearer se-user\\r\\n"
JSON = b"Content-Type: application/json\\r\\n"
ATTACKS = [
    START + JSON + b"Content-Length: 500000\\r\\n\\r\\n" + b"[" * 500_000,
    START + JSON + b"Transfer-Encoding: chunked\\r\\n\\r\\n" + b"1\\r\\nx\\r\\n" * 50_000,
    START + b"x: y\\r\\n" * 50_000 + b"\\r\\n",
    b"\\xff" * 100_000 + b"\\r\\n\\r\\n",
]


def attack(bytes_sent):
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
            try:
                connection.sendall(bytes_sent)
                connection.recv(100)
            except OSError:
                pass


end = time.monotonic() + 2
threads = [threading.Thread(target=attack, args=[each]) for each in ATTACKS]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_the_loop_stays_quick_under_attack(server: Running) -> None:
    """Long bodies, tiny chunks, floods of headers and nonsense, as fast as one process sends."""
    lags: list[float] = []
    done = threading.Event()

    async def watch() -> None:
        while not done.is_set():
            begin = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - begin - 0.005)

    watching = asyncio.run_coroutine_threadsafe(watch(), server.loop)
    subprocess.run([sys.executable, "-c", _ATTACK, str(server.port)], check=True, timeout=60)
    done.set()
    watching.result(5)
    assert sorted(lags)[int(len(lags) * 0.9)] < 0.15  # s; 0.5 with chunks of any size
