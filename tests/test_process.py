"""Servers that benchmarks start are stopped at the end, and not confused with others."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scissor_vllm.loadtest.process import free_port, is_taken, running_server

SERVER = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""
RUN = """
import sys, time
from pathlib import Path
from scissor_vllm.loadtest.process import end_on_sigterm, running_server
end_on_sigterm()
command, port, log = [sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])
with running_server("it", command, port=port, log=log, timeout_seconds=60):
    print("up", flush=True)
    time.sleep(600)
"""


def test_a_server_on_a_taken_port_is_refused_not_measured(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, "-c", SERVER]
        with (
            pytest.raises(RuntimeError, match=f"port {port} .* another server answers"),
            running_server("it", command, port=port, log=tmp_path / "log", timeout_seconds=60),
        ):
            pass
    assert not (tmp_path / "log").exists()


def test_a_command_that_is_told_to_end_stops_its_server_first(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", RUN, SERVER, str(port), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "up\n"
        assert is_taken(port)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
    assert not is_taken(port)
