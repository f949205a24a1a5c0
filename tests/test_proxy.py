"""The proxies of ``deploy/``: Caddy as shipped, the proxy of /metrics, and the nginx example.

Real programs run in front of a stand-in server.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from tests.proxies import (
    DEPLOY,
    KEY,
    SERVER_KEY,
    START_SECONDS,
    Answer,
    ask,
    caddy,
    free_port,
    receive,
    request,
    run,
    running,
    stand_in,
    tool,
)

# ---- Caddy ----

API = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/responses",
    "/v1/responses/resp_1",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/scissor/picture",
    "/v1/scissor/estimate",
    "/tokenize",
    "/detokenize",
)
INSIDE = (
    "/",
    "/metrics",
    "/metrics/",
    "/METRICS",
    "//metrics",
    "/v1/../metrics",
    "/health/../metrics",
    "/docs",
    "/openapi.json",
    "/version",
    "/ping",
    "/invocations",
    "/load",
    "/server_info",
    "/sleep",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/start_profile",
    "/scale_elastic_ep",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/files",
    "/inference/v1/generate",
)


def test_the_proxy_passes_the_api_with_the_key_and_health_without(tmp_path: Path) -> None:
    with stand_in() as server, caddy(tmp_path, server.port) as proxy:
        assert ask(proxy.port, "/health", key=None) == (200, "0")
        for path in API:
            assert ask(proxy.port, path, "POST", b"{}") == (200, "2"), path
        assert server.asked == ["/health", *API]
        # Clients' keys stay at the proxy.
        assert server.keys == [None, *[f"Bearer {SERVER_KEY}"] * len(API)]
        server.asked.clear()
        for path in API:
            # The last is what the configuration says, not what it means.
            for key in (None, "", "wrong", f"{KEY}x", SERVER_KEY, "{file./keys/key}"):
                answer = request(proxy.port, path, "POST", b"{}", key)
                assert answer.status == 401, (path, key)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "API key" in json.loads(answer.body)["error"]["message"]
        assert server.asked == []


def test_two_keys_are_taken_while_one_replaces_the_other_without_a_restart(tmp_path: Path) -> None:
    with stand_in() as server, caddy(tmp_path, server.port) as proxy:

        def statuses() -> list[int]:
            return [ask(proxy.port, "/v1/models", key=key)[0] for key in (KEY, "next")]

        assert statuses() == [200, 401]
        (tmp_path / "keys" / "previous-key").write_text(KEY)
        (tmp_path / "keys" / "key").write_text("next")
        assert statuses() == [200, 200]
        (tmp_path / "keys" / "previous-key").unlink()
        assert statuses() == [401, 200]


def test_the_proxy_passes_the_web_pages_files_without_the_key_and_takes_nothing_there(
    tmp_path: Path,
) -> None:
    with stand_in() as server, caddy(tmp_path, server.port) as proxy:
        for path in ("/scissor", "/scissor/ask.js"):
            assert ask(proxy.port, path, key=None) == (200, "0")
            assert ask(proxy.port, path, "POST", b"{}")[0] == 404
        assert ask(proxy.port, "/scissor/../metrics", key=None)[0] == 404
        assert ask(proxy.port, "/scissors", key=None)[0] == 404
        assert server.asked == ["/scissor", "/scissor/ask.js"]


def test_the_proxy_keeps_everything_else_inside(tmp_path: Path) -> None:
    with stand_in() as server, caddy(tmp_path, server.port) as proxy:
        for path in (*INSIDE, "/alive"):
            for method in ("GET", "POST"):
                status, body = ask(proxy.port, path, method)
                assert status == 404, path
                assert json.loads(body)["error"]["message"] == "no such route"
        assert server.asked == []


def test_the_proxy_asks_for_a_key_even_where_none_was_left(tmp_path: Path) -> None:
    with stand_in() as server, caddy(tmp_path, server.port) as proxy:
        for path in ("unlink", "empty"):
            if path == "unlink":
                (tmp_path / "keys" / "key").unlink()
            else:
                (tmp_path / "keys" / "key").write_text("")
            for key in (None, "", " ", KEY):
                assert ask(proxy.port, "/tokenize", "POST", b"{}", key)[0] == 401
        assert server.asked == []


def test_the_proxys_own_errors_are_json(tmp_path: Path) -> None:
    """A body that is too large, of known and of unknown length, and a server that is gone."""
    with stand_in() as server, caddy(tmp_path, server.port, MAX_REQUEST_SIZE="100KB") as proxy:
        assert ask(proxy.port, "/v1/completions", "POST", b"x" * 100_000) == (200, "100000")
        parts = iter([b"x" * 50_000, b"x" * 50_001])
        for body in (b"x" * 100_001, parts):
            answer = request(proxy.port, "/v1/completions", "POST", body)
            assert answer.status == 413
            assert_is_error(answer.body, 413, "at most 100KB: send fewer")
            assert answer.headers["content-type"] == "application/json"
    with caddy(tmp_path, free_port()) as proxy:
        answer = request(proxy.port, "/v1/completions", "POST", b"{}")
        assert answer.status == 502
        assert_is_error(answer.body, 502, "does not answer")
        assert answer.headers["retry-after"] == "5"


def test_a_server_that_never_begins_its_answer_is_given_up(tmp_path: Path) -> None:
    with stand_in() as server, caddy(tmp_path, server.port, ANSWER_TIMEOUT="1s") as proxy:
        server.answering.clear()
        answer = request(proxy.port, "/v1/completions", "POST", b"{}")
        assert answer.status == 504
        assert_is_error(answer.body, 504, "within 1s")


def assert_is_error(body: str, code: int, message: str) -> None:
    """Hold a body to the error of the OpenAI API."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert message in error["message"]


def test_the_proxy_bounds_the_requests_in_flight(tmp_path: Path) -> None:
    with (
        stand_in() as server,
        caddy(tmp_path, server.port, MAX_REQUESTS_IN_FLIGHT="2") as proxy,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        server.answering.clear()
        taken = [pool.submit(ask, proxy.port, "/v1/completions", "POST", b"{}") for _ in range(2)]
        wait_until(lambda: len(server.asked) == 2)
        refused = request(proxy.port, "/v1/completions", "POST", b"{}")
        assert refused.status == 503
        assert refused.headers["retry-after"] == "1"
        assert_is_error(refused.body, 503, "at most 2 requests may be in flight")
        # Whoever watches the server is no client.
        health = pool.submit(ask, proxy.port, "/health")
        wait_until(lambda: server.asked[-1] == "/health")
        server.answering.set()
        assert [answer.result() for answer in (*taken, health)] == [
            (200, "2"),
            (200, "2"),
            (200, "0"),
        ]
        assert ask(proxy.port, "/v1/completions", "POST", b"{}") == (200, "2")


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + START_SECONDS
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_streams_tell_proxies_in_front_not_to_buffer(tmp_path: Path) -> None:
    with stand_in() as server, caddy(tmp_path, server.port) as proxy:
        answer = request(proxy.port, "/v1/chat/completions", "POST", b"{}")
        assert "x-accel-buffering" not in answer.headers
        server.content_type = "text/event-stream; charset=utf-8"
        answer = request(proxy.port, "/v1/chat/completions", "POST", b"{}")
        assert answer.headers["x-accel-buffering"] == "no"


CHAT = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\n"
    f"Authorization: Bearer {KEY}\r\nContent-Length: 2\r\n\r\n{{}}"
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize("num_events", [0, 3])
def test_the_proxy_passes_each_event_at_once_and_tells_the_server_that_a_client_has_hung_up(
    tmp_path: Path, num_events: int
) -> None:
    """An answer that nobody reads would go on taking the engine's time."""
    with (
        socket.create_server(("127.0.0.1", 0)) as upstream,
        caddy(tmp_path, upstream.getsockname()[1]) as proxy,
    ):
        check_stream(upstream, socket.create_connection(("127.0.0.1", proxy.port)), num_events)


def check_stream(upstream: socket.socket, client: socket.socket, num_events: int) -> None:
    """Stream events through a proxy, then hang up."""
    upstream.settimeout(START_SECONDS)
    with client:
        client.sendall(CHAT.encode())
        server, _ = upstream.accept()
        with server:
            receive(server, b"{}")
            if num_events:
                server.sendall(STREAM_HEAD)
            for number in range(num_events):
                event = f"data: {number}\n\n".encode()
                server.sendall(chunk(event))
                receive(client, event)
            client.close()
            server.settimeout(START_SECONDS)
            assert server.recv(1) == b""


def test_a_stream_in_flight_ends_whole_when_the_proxy_is_stopped(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as upstream,
        caddy(tmp_path, upstream.getsockname()[1]) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port)) as client,
    ):
        upstream.settimeout(START_SECONDS)
        client.sendall(CHAT.encode())
        server, _ = upstream.accept()
        with server:
            receive(server, b"{}")
            server.sendall(STREAM_HEAD + chunk(b"data: 0\n\n"))
            receive(client, b"data: 0")
            proxy.process.terminate()
            wait_until(lambda: is_closed(proxy.port))
            server.sendall(chunk(b"data: 1\n\n") + chunk(b""))
            receive(client, chunk(b"data: 1\n\n") + chunk(b""))
        proxy.process.wait(START_SECONDS)


def is_closed(port: int) -> bool:
    """Return whether nothing listens on a port any more."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


def test_the_proxy_opens_a_connection_to_the_server_for_each_request(tmp_path: Path) -> None:
    with stand_in() as server, caddy(tmp_path, server.port) as proxy:
        for _ in range(3):
            assert ask(proxy.port, "/v1/completions", "POST", b"{}") == (200, "2")
        assert len(set(server.connections)) == 3


def test_a_name_is_tls_on_the_same_port_with_a_certificate_that_is_kept(tmp_path: Path) -> None:
    """For "localhost" Caddy signs by itself; a public name's authority is out of reach here."""
    settings = {"SCHEME": "https", "TLS_NAME": "localhost"}
    with stand_in() as server, caddy(tmp_path, server.port, **settings) as proxy:
        root = tmp_path / "certificates" / "caddy" / "pki" / "authorities" / "local" / "root.crt"
        wait_until(root.exists)
        trusting = ssl.create_default_context(cafile=root)
        wait_until(lambda: has_certificate(proxy.port, trusting))
        for key, status in ((KEY, 200), ("wrong", 401)):
            answer = request(proxy.port, "/v1/models", key=key, tls=trusting, host="localhost")
            assert answer.status == status
        # Plain HTTP is refused, not served beside it.
        assert ask(proxy.port, "/v1/models")[0] == 400
        assert server.asked == ["/v1/models"]
        if curl := shutil.which("curl"):
            # HTTP/2 passes a key of spaces on as it is; the file of a second key does not exist.
            command = [curl, "-s", "--http2", "--cacert", str(root), "-H", "Authorization: Bearer "]
            command += ["-w", "%{http_version} %{http_code}", "-o", str(tmp_path / "body")]
            printed = run(*command, f"https://localhost:{proxy.port}/v1/models").stdout
            assert printed == "2 401"


def has_certificate(port: int, trusting: ssl.SSLContext) -> bool:
    """Return whether the proxy has a certificate for localhost yet."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
            trusting.wrap_socket(plain, server_hostname="localhost").close()
    except OSError:
        return False
    return True


def test_the_proxy_says_to_its_own_container_alone_that_it_is_alive(tmp_path: Path) -> None:
    with caddy(tmp_path, free_port()) as proxy:
        assert ask(proxy.alive_port, "/alive", key=None)[0] == 200
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", proxy.alive_port))


# ---- The proxy of /metrics ----


def test_prometheus_reaches_the_metrics_alone(tmp_path: Path) -> None:
    port = free_port()
    command = [tool("caddy"), "run", "--config", str(DEPLOY / "Caddyfile.metrics")]
    with stand_in() as server:
        environment = {
            "HOME": str(tmp_path),
            "METRICS_PORT": str(port),
            "ALIVE_PORT": str(free_port()),
            "UPSTREAM": f"127.0.0.1:{server.port}",
        }
        command += ["--adapter", "caddyfile"]
        with running(command, environment, port, tmp_path / "log"):
            assert ask(port, "/metrics", key=None) == (200, "0")
            assert ask(port, "/metrics", "POST", b"{}", key=None)[0] == 404
            inside = {path for path in INSIDE if path.rstrip("/").lower() != "/metrics"}
            # These name /metrics too, once they are read as a path.
            inside -= {"//metrics", "/v1/../metrics", "/health/../metrics"}
            for path in (*API, "/health", *inside):
                assert ask(port, path)[0] == 404, path
            assert server.asked == ["/metrics"]


# ---- nginx ----


ROUTE = "/v1/chat/completions"


@pytest.fixture(scope="module")
def nginx_program() -> str:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("no nginx: install nginx-light to run the examples")
    return program


@dataclass(frozen=True)
class Nginx:
    """A running nginx."""

    port: int
    trusting: ssl.SSLContext

    def connect(self) -> socket.socket:
        """Return a TLS connection."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=START_SECONDS)
        return self.trusting.wrap_socket(plain, server_hostname="localhost")

    def request(
        self, path: str, method: str = "GET", body: bytes | None = None, key: str | None = KEY
    ) -> Answer:
        """Return the answer to a request."""
        return request(self.port, path, method, body, key, self.trusting, "localhost")


@contextlib.contextmanager
def nginx(program: str, folder: Path, configuration: str, upstream: int) -> Iterator[Nginx]:
    """Yield nginx with a configuration of ours; only its two addresses are replaced."""
    port = free_port()
    for ours, here in (("443 ssl", f"127.0.0.1:{port} ssl"), ("127.0.0.1:8000", str(upstream))):
        assert configuration.count(ours) == 1
        here = f"127.0.0.1:{here}" if here.isdigit() else here
        configuration = configuration.replace(ours, here)
    (folder / "nginx.conf").write_text(configuration)
    (folder / "clients.map").write_text(
        f'"Bearer {KEY}" first;\n"Bearer {KEY}-new" first;\n"Bearer another" second;\n'
    )
    (folder / "server-key.conf").write_text(
        f'proxy_set_header Authorization "Bearer {SERVER_KEY}";\n'
    )
    tls = folder / "tls"
    tls.mkdir()
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files: list[str | Path] = ["-keyout", tls / "key.pem", "-out", tls / "certificate.pem"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run("openssl", "req", "-x509", "-days", "1", *key, *names, *files)
    directives = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
    command = [program, "-p", str(folder), "-c", "nginx.conf", "-g", directives]
    with running(command, os.environ, port, folder / "nginx.log"):
        yield Nginx(port, ssl.create_default_context(cafile=tls / "certificate.pem"))


def shipped_configuration() -> str:
    return (DEPLOY / "nginx" / "nginx.conf").read_text()


def ingress_configuration() -> str:
    """Return what ingress-nginx makes of our Ingress: its annotations as nginx's directives."""
    ingress = yaml.safe_load((DEPLOY / "kubernetes" / "ingress.yaml").read_text())
    annotations = {
        name.removeprefix("nginx.ingress.kubernetes.io/"): value
        for name, value in ingress["metadata"]["annotations"].items()
    }
    http, directives = [], []
    for name, value in annotations.items():
        if name == "proxy-body-size":
            directives.append(f"client_max_body_size {value};")
        elif name == "limit-connections":
            http.append("limit_conn_zone $binary_remote_addr zone=in_flight:1m;")
            directives.append(f"limit_conn in_flight {value};")
        else:
            directives.append(f"{name.replace('-', '_')} {value};")
    (rule,) = ingress["spec"]["rules"]
    locations = [
        f"location = {path['path']} {{ proxy_pass http://servers; {' '.join(directives)} }}"
        for path in rule["http"]["paths"]
    ]
    temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    http += [f"{name}_temp_path {name};" for name in temporary]
    return f"""
        pid nginx.pid;
        error_log stderr;
        events {{}}
        http {{
            access_log off;
            {" ".join(http)}
            upstream servers {{ server 127.0.0.1:8000; }}
            server {{
                listen 443 ssl;
                ssl_certificate tls/certificate.pem;
                ssl_certificate_key tls/key.pem;
                {" ".join(locations)}
            }}
        }}
    """


EXAMPLES = {"nginx": shipped_configuration, "ingress": ingress_configuration}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_nginx_examples_pass_large_bodies_and_each_event_at_once(
    nginx_program: str, tmp_path: Path, example: str
) -> None:
    configuration = EXAMPLES[example]()
    limit = 128 * 2**20
    with (
        stand_in() as server,
        nginx(nginx_program, tmp_path, configuration, server.port) as proxy,
    ):
        assert proxy.request(ROUTE, "POST", b"x" * limit).body == str(limit)
        assert proxy.request(ROUTE, "POST", b"x" * (limit + 1)).status == 413
        assert proxy.request("/metrics").status == 404
        assert server.asked == [ROUTE]
    shutil.rmtree(tmp_path / "tls")
    with (
        socket.create_server(("127.0.0.1", 0)) as upstream,
        nginx(nginx_program, tmp_path, configuration, upstream.getsockname()[1]) as proxy,
    ):
        for num_events in (0, 3):
            check_stream(upstream, proxy.connect(), num_events)


def test_the_nginx_example_knows_its_clients_and_bounds_each_one(
    nginx_program: str, tmp_path: Path
) -> None:
    with (
        stand_in() as server,
        nginx(nginx_program, tmp_path, shipped_configuration(), server.port) as proxy,
        concurrent.futures.ThreadPoolExecutor(64) as pool,
    ):
        for key in (None, "", "wrong", SERVER_KEY):
            answer = proxy.request(ROUTE, "POST", b"{}", key)
            assert answer.status == 401
            assert_is_error(answer.body, 401, "API key")
        assert proxy.request("/health", key=None).status == 200
        for key in (KEY, f"{KEY}-new", "another"):
            assert proxy.request(ROUTE, "POST", b"{}", key).body == "2"
        assert server.keys == [None, *[f"Bearer {SERVER_KEY}"] * 3]
        for path in INSIDE:
            assert proxy.request(path).status == 404, path
        server.content_type = "text/event-stream"
        assert proxy.request(ROUTE, "POST", b"{}").headers["x-accel-buffering"] == "no"
        server.asked.clear()
        server.answering.clear()
        # Both keys of one client count together.
        keys = [KEY, f"{KEY}-new"] * 16
        taken = [pool.submit(proxy.request, ROUTE, "POST", b"{}", key) for key in keys]
        wait_until(lambda: len(server.asked) == 32)
        refused = proxy.request(ROUTE, "POST", b"{}")
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert_is_error(refused.body, 429, "at most 32 requests of one client")
        other_client = pool.submit(proxy.request, ROUTE, "POST", b"{}", "another")
        wait_until(lambda: len(server.asked) == 33)
        server.answering.set()
        assert {answer.result().status for answer in (*taken, other_client)} == {200}
        refused = proxy.request(ROUTE, "POST", b"x" * (128 * 2**20 + 1))
        assert_is_error(refused.body, 413, "at most 128 MiB")


def test_the_nginx_example_says_in_json_that_no_server_answers(
    nginx_program: str, tmp_path: Path
) -> None:
    with nginx(nginx_program, tmp_path, shipped_configuration(), free_port()) as proxy:
        answer = proxy.request(ROUTE, "POST", b"{}")
        assert answer.status == 502
        assert_is_error(answer.body, 502, "does not answer")


def test_the_ingress_has_the_numbers_of_the_nginx_example() -> None:
    """The same bodies and timeouts, written once as directives and once as annotations."""
    directives = dict(re.findall(r"^\s*(\w+) ([^;{]+);", shipped_configuration(), re.M))
    ingress = yaml.safe_load((DEPLOY / "kubernetes" / "ingress.yaml").read_text())
    for name, value in ingress["metadata"]["annotations"].items():
        directive = name.removeprefix("nginx.ingress.kubernetes.io/").replace("-", "_")
        directive = {"proxy_body_size": "client_max_body_size"}.get(directive, directive)
        if directive == "limit_connections":
            assert directives["limit_conn"] == f"in_flight {value}"
            continue
        assert directives[directive].removesuffix("s") == value, name
