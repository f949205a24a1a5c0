"""Real servers for tests, one at a time, and the way to ask them with the ``openai`` client."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch

from bench.serving import COMMANDS
from scissor_vllm import CompressedTokens
from scissor_vllm.compression import get_compressor
from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION
from tests.preloaded import SMALL, Preloaded, run_command

START_SECONDS = 300

SCISSOR = (sys.executable, "-m", "scissor_vllm.cli", "serve")
"""Our command; the model follows."""
STOCK = tuple(COMMANDS["vllm"])
"""vLLM's own server; the model follows."""


def compress_as_served(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return what a server makes of tokens (T, P, D) that is not told by which method."""
    return get_compressor(DEFAULT_VIDEO_COMPRESSION)(tokens, num_retained)


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    log: Path
    process: subprocess.Popen[bytes] | Preloaded

    @property
    def client(self) -> openai.OpenAI:
        """A client that does not repeat failed requests."""
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="x", max_retries=0, timeout=120
        )

    def ask(
        self,
        *parts: Path | str,
        ratio: object = None,
        max_tokens: int = 8,
        **options: Any,
    ) -> Any:
        """Return the completion for a message of videos or pictures (paths) and text, greedy.

        It carries the two likeliest tokens at each step and their log probabilities: with random
        weights they tell far more than the text.
        """
        extra: dict[str, object] = {"ignore_eos": True, **options.pop("extra_body", {})}
        if ratio is not None:
            extra["retention_ratio"] = ratio
        return self.client.chat.completions.create(
            model=options.pop("model", "demo"),
            messages=[message(*parts)],  # type: ignore[list-item]
            max_completion_tokens=max_tokens,
            temperature=0,
            logprobs=options.pop("logprobs", True),
            top_logprobs=options.pop("top_logprobs", 2),
            extra_body=extra,
            **options,
        )

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of a raw POST, for what no client would send."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=body,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str) -> str:
        """Return the body of a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return str(response.read().decode())

    def counter(self, name: str, **labels: str) -> float:
        """Return the sum of a Prometheus counter over those labels that are not given."""
        lines = re.findall(rf"^{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", self.get("/metrics"), re.M)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        found = [float(value) for text, value in lines if all(each in text for each in wanted)]
        if not found:
            raise LookupError(f"no counter {name} {labels}")
        return sum(found)


def message(*parts: Path | str) -> dict[str, Any]:
    """Return a user's message of media (paths) and text."""
    return {"role": "user", "content": [_part(part) for part in parts]}


def _part(part: Path | str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part.suffix == ".png":
        return {"type": "image_url", "image_url": {"url": data_url(part, "image/png")}}
    return {"type": "video_url", "video_url": {"url": data_url(part, "video/mp4")}}


def data_url(path: Path, media_type: str) -> str:
    """Return the file as a data URL."""
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def steps(completion: Any) -> list[tuple[str, float]]:
    """Return the answer's tokens with their log probabilities, exact as sent."""
    return [(step.token, step.logprob) for step in completion.choices[0].logprobs.content]


def same_answer(left: Any, right: Any, tolerance: float = 1e-4) -> bool:
    """Return whether two answers are the same up to float32's rounding."""
    if left.usage.prompt_tokens != right.usage.prompt_tokens:
        return False
    pairs = list(zip(steps(left), steps(right), strict=True))
    return all(a == b and abs(p - q) < tolerance for (a, p), (b, q) in pairs)


@contextmanager
def serving(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    preloaded: bool = False,
) -> Iterator[Server]:
    """Yield a server started with this command, stopped with all its processes at the end.

    Args:
        command: ``python -m`` and what follows; host and port are added.
        environment: variables beside those of this process.
        log: file for what it prints.
        preloaded: whether it begins with vLLM imported, which saves most of a start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    variables = {**os.environ, **environment}
    process: subprocess.Popen[bytes] | Preloaded
    with log.open("w") as output:
        if preloaded:
            process = Preloaded(run_command, command, environment=variables, log=log)
        else:
            process = subprocess.Popen(
                command,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    try:
        _wait_until_healthy(process, port, log)
        yield Server(port, log, process)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes] | Preloaded, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    tail = "".join(log.read_text().splitlines(keepends=True)[-60:])
    raise RuntimeError(f"the server did not start: {' '.join(map(str, process.args))}\n{tail}")  # type: ignore[arg-type]


@dataclass
class OneServer:
    """Keeps one server running at a time: engines side by side would share two cores."""

    folder: Path
    _running: Any = None
    _key: Any = None
    _server: Server | None = None
    _count: int = field(default=0)

    def get(self, *command: str, environment: Mapping[str, str] | None = None) -> Server:
        """Return the server of this command, started if another or none is running."""
        key = (command, tuple(sorted((environment or {}).items())))
        if key != self._key:
            self.stop()
            self._count += 1
            log = self.folder / f"server-{self._count}.log"
            variables = {**SMALL, **(environment or {})}
            self._running = serving(command, variables, log, preloaded=True)
            self._server = self._running.__enter__()
            self._key = key
        assert self._server is not None
        return self._server

    def stop(self) -> None:
        """Stop what is running."""
        if self._running is not None:
            self._running.__exit__(None, None, None)
        self._running = self._key = self._server = None
