"""Starts the proxies of ``deploy/`` in front of a stand-in server, and sends raw requests."""

from __future__ import annotations

import contextlib
import http.client
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KEY = "a-key-of-the-tests"
SERVER_KEY = "a-key-of-the-server"
START_SECONDS = 30


def tool(name: str) -> str:
    """Return the path of a program of deploy/cpu/requirements-dev.txt."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise LookupError(f"{name} is not installed: `make test` installs what tests need")
    return found


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; a failure shows its output."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300, **options
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done


@dataclass
class StandIn:
    """A server that answers every request, and stores the requests with their sources."""

    port: int
    asked: list[str] = field(default_factory=list)
    connections: list[int] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    content_type: str = "application/json"
    answering: threading.Event = field(default_factory=threading.Event)
    """Set: requests are answered. Cleared: requests wait."""


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """Yield a server that answers every request with 200 and the size of its body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            size = self._read_body()
            if size is None:
                self.close_connection = True
                return
            known.asked.append(self.path)
            known.connections.append(self.client_address[1])
            known.keys.append(self.headers.get("Authorization"))
            known.answering.wait(START_SECONDS)
            body = str(size).encode()
            self.send_response(200)
            self.send_header("Content-Type", known.content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def _read_body(self) -> int | None:
            """Return the size of the body, None if the proxy ended it early."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                length = int(self.headers.get("Content-Length", 0))
                return length if len(self.rfile.read(length)) == length else None
            size = 0
            while line := self.rfile.readline():
                length = int(line, 16)
                # A line ends each part.
                if len(self.rfile.read(length + 2)) < length + 2:
                    return None
                if length == 0:
                    return size
                size += length
            return None

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known = StandIn(server.server_port)
    known.answering.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield known
    finally:
        known.answering.set()
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running(
    command: list[str], environment: Mapping[str, str], port: int, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a program when it listens on a port, and end it afterwards."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait(30)


@dataclass(frozen=True)
class Caddy:
    """A running Caddy with our Caddyfile."""

    port: int
    alive_port: int
    folder: Path
    """Folder with ``keys``, ``server-key`` and ``certificates``."""
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def caddy(folder: Path, upstream: int, **settings: str) -> Iterator[Caddy]:
    """Yield Caddy with our Caddyfile in front of a server, with settings of the Compose file."""
    (folder / "keys").mkdir(exist_ok=True)
    (folder / "keys" / "key").write_text(KEY)
    (folder / "server-key").write_text(SERVER_KEY)
    port, alive_port = free_port(), free_port()
    environment = {
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder / "certificates"),
        "PROXY_PORT": str(port),
        "ALIVE_PORT": str(alive_port),
        "UPSTREAM": f"127.0.0.1:{upstream}",
        "KEYS": str(folder / "keys"),
        "SERVER_KEY_FILE": str(folder / "server-key"),
        **settings,
    }
    command = [tool("caddy"), "run", "--config", str(DEPLOY / "Caddyfile")]
    with running(
        [*command, "--adapter", "caddyfile"], environment, port, folder / "caddy.log"
    ) as process:
        yield Caddy(port, alive_port, folder, process)


@contextlib.contextmanager
def proxy(folder: Path, upstream: int) -> Iterator[int]:
    """Yield the port of Caddy with our Caddyfile in front of a server that takes the same key."""
    with caddy(folder, upstream) as running_caddy:
        (folder / "server-key").write_text(KEY)
        yield running_caddy.port


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of an answer."""

    status: int
    headers: Mapping[str, str]
    body: str


def request(
    port: int,
    path: str,
    method: str = "GET",
    body: bytes | Iterator[bytes] | None = None,
    key: str | None = KEY,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> Answer:
    """Return the answer to a request; the path is sent unchanged."""
    connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
    options: dict[str, Any] = {"timeout": 30}
    if tls is not None:
        connect = http.client.HTTPSConnection
        options["context"] = tls
    connection = connect(host, port, **options)
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    try:
        connection.request(method, path, body, headers, encode_chunked=isinstance(body, Iterator))
        response = connection.getresponse()
        # Names of headers in lower case.
        response_headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, response_headers, response.read().decode())
    finally:
        connection.close()


def ask(
    port: int, path: str, method: str = "GET", body: bytes | None = None, key: str | None = KEY
) -> tuple[int, str]:
    """Return status and body; the path is sent unchanged."""
    answer = request(port, path, method, body, key)
    return answer.status, answer.body


def receive(connection: socket.socket, wanted: bytes) -> None:
    """Return the received bytes, once they contain ``wanted``."""
    connection.settimeout(30)
    received = b""
    while wanted not in received:
        part = connection.recv(4096)
        assert part, received
        received += part
