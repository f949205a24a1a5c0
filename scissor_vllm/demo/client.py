"""``scissor-vllm demo``: serves the demo model and asks about one clip at several ratios."""

import argparse
import base64
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scissor_vllm.cli import NEEDS_VLLM, has_vllm
from scissor_vllm.demo.model import DEMO_MODEL, demo_model_path
from scissor_vllm.loadtest.process import free_port, running_server

CLIP = Path(__file__).with_name("clip.mp4")
"""Made by ``bench/demo_clip.py``."""
QUESTION, ANSWER = "what digit does the sign show ?", "9"
RATIOS = (1.0, 0.5, 0.25, 0.1)
START_SECONDS = 300


@dataclass(frozen=True)
class Answer:
    """The client's view of one request."""

    retention_ratio: float
    num_video_tokens: int
    num_retained_video_tokens: int
    prompt_tokens: int
    seconds_to_first_token: float
    text: str


def main(argv: list[str]) -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="scissor-vllm demo", description=__doc__)
    parser.add_argument(
        "--video", type=Path, default=CLIP, help="an mp4 (default: the bundled one)"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--question", default=QUESTION, help="(default: %(default)r)")
    parser.add_argument(
        "--base-url", help="of a running server, http://HOST:PORT/v1; none is started"
    )
    args = parser.parse_args(argv)
    if not args.video.is_file():
        parser.error(f"--video must name a file, got {args.video}: check the path")
    try:
        if args.base_url:
            ask_and_print(args.base_url, args.video, args.question, args.ratios)
        elif not has_vllm():
            raise RuntimeError(NEEDS_VLLM)
        else:
            with demo_server() as base_url:
                ask_and_print(base_url, args.video, args.question, args.ratios)
    except RuntimeError as error:
        print(f"scissor-vllm demo: {error}", file=sys.stderr)
        return 1
    return 0


def ask_and_print(base_url: str, video: Path, question: str, ratios: list[float]) -> None:
    """Ask at every ratio and print one line each."""
    import openai

    client = openai.OpenAI(base_url=base_url, api_key="unused")
    model = client.models.list().data[0].id
    # The first request of a server includes lazy setup, so it has a ratio of its own.
    ask(client, model, video, question, 0.9)
    right = f" (right: {ANSWER!r})" if (video, question) == (CLIP, QUESTION) else ""
    print(f"\n{video.name}: {question}{right}\n")
    print("ratio  video tokens      prompt tokens  first token  answer")
    for ratio in ratios:
        answer = ask(client, model, video, question, ratio)
        tokens = f"{answer.num_video_tokens} -> {answer.num_retained_video_tokens}"
        print(
            f"{answer.retention_ratio:<6g} {tokens:<17} {answer.prompt_tokens:>13}  "
            f"{answer.seconds_to_first_token * 1000:>8.0f} ms  {answer.text!r}",
            flush=True,
        )
    if model == DEMO_MODEL:
        card = demo_model_path() / "README.md"
        print(f"\nThe demo model knows a made-up world and nothing else; its card: {card}")


def ask(client, model: str, video: Path, question: str, ratio: float) -> Answer:  # type: ignore[no-untyped-def]
    """Return the answer to a question about a video, streamed."""
    url = f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    start = time.perf_counter()
    first, text, usage = None, "", None
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"retention_ratio": ratio},
    ):
        if chunk.choices and first is None and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        usage = chunk if chunk.usage else usage
    if usage is None:
        raise RuntimeError("the server sent no usage: is it a vLLM server?")
    compression = getattr(usage, "video_compression", None)
    if compression is None:
        raise RuntimeError(
            "the server does not compress videos: start it with `scissor-vllm serve` and a "
            "supported model"
        )
    return Answer(
        retention_ratio=compression["retention_ratio"],
        num_video_tokens=compression["num_video_tokens"],
        num_retained_video_tokens=compression["num_retained_video_tokens"],
        prompt_tokens=usage.usage.prompt_tokens,
        seconds_to_first_token=first if first is not None else time.perf_counter() - start,
        text=text,
    )


@contextmanager
def demo_server(*flags: str) -> Iterator[str]:
    """Yield the base URL of a server of the demo model, stopped at the end.

    Args:
        flags: additional flags of ``scissor-vllm serve``.

    Raises:
        RuntimeError: it did not start; the message ends with its log.
    """
    command = [sys.executable, "-m", "scissor_vllm.cli", "serve", DEMO_MODEL, *flags]
    with tempfile.TemporaryDirectory(prefix="scissor-vllm-demo-") as folder:
        print("starting the server (about a minute)", end="", flush=True)
        with running_server(
            "the server",
            command,
            port=free_port(),
            log=Path(folder, "server.log"),
            timeout_seconds=START_SECONDS,
            on_wait=lambda: print(".", end="", flush=True),
        ) as base_url:
            print(" ready", flush=True)
            yield f"{base_url}/v1"
        print("server stopped")
