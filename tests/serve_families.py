"""Serves every family with random weights under load, and checks K of every answer.

    python -m tests.serve_families [FAMILY ...] [--output FILE] [--concurrency 32] [--seconds 5]

Each family has a server of its own, several at a time on one GPU. A server is asked about distinct
clips at mixed ratios, some beside a picture, with ``--concurrency`` requests in flight. A row tells
what came back. The exit code is 1 if a server did not start, if a request failed, or if the model
got another number of tokens than the ratio gives.

It needs vLLM with this package, on a GPU or a CPU. The package need not be installed: its entry
points are made in a folder beside the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import torch

from bench.numbered_clips import make_clip
from scissor_vllm import num_retained_tokens
from scissor_vllm.loadtest.record import environment, write_json
from tests.families import marks_of, tiny_families
from tests.preloaded import SMALL
from tests.serving import SCISSOR, Server, serving
from tests.tiny_models.spread import LOAD_FORMAT

RATIOS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.01)
SIZES = ((320, 180, 24), (176, 320, 16), (256, 256, 9))
"""Of clips: width, height, number of frames."""
NUM_CLIPS = 12

ENTRY_POINTS = {
    "scissor_vllm_here": """\
[vllm.general_plugins]
scissor_vllm = scissor_vllm.plugin:register
[vllm.endpoint_plugins]
scissor_vllm = scissor_vllm.frontend.endpoint:RetentionEndpoint
""",
    "spread_weights": """\
[vllm.general_plugins]
spread_weights = tests.tiny_models.spread:register_spread_weights
""",
}
GPU_OPTIONS = (
    # Servers side by side: each says what it takes, instead of measuring what the others leave.
    "--gpu-memory-utilization=0.05",
    f"--kv-cache-memory-bytes={2 << 30}",
    # Tiny models gain nothing by it.
    "--no-enable-flashinfer-autotune",
)
GPU_ENVIRONMENT = {
    # FlashInfer's kernels are built at the first start, which takes minutes.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # So are those that torch.compile makes of a video processor.
    "TORCHDYNAMO_DISABLE": "1",
    # Triton compiles 88 configurations of six kernels of Qwen3.5, which takes 100 s. The first one
    # of each kernel takes 6 s for all, and any configuration gives a right answer.
    "VLLM_TRITON_FORCE_FIRST_CONFIG": "1",
}
GRAPHS = json.dumps(
    {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32],
    }
)


# Checkpoints at sizes that a GPU's kernels are made for.


def enlarged(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tiny checkpoint's config with heads of 128 in a language model 1024 wide."""
    text = config["text_config"]
    factor = 4
    scales = {
        "hidden_size": 8,
        "intermediate_size": 8,
        **dict.fromkeys(("head_dim", "global_head_dim", "hidden_size_per_layer_input"), factor),
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), factor),
        **{"mamba_num_heads": 4, "mamba_head_dim": 2, "ssm_state_size": 8, "chunk_size": 2},
    }
    text |= {name: scale * text[name] for name, scale in scales.items() if text.get(name)}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    for rope in (text.get("rope_parameters"), text.get("rope_scaling")):
        if rope and rope.get("mrope_section"):
            rope["mrope_section"] = [factor * size for size in rope["mrope_section"]]
    vision = config.get("vision_config", {})
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = text["hidden_size"]
    if "embed_dim" in vision:  # Qwen2-VL's
        vision["hidden_size"] = text["hidden_size"]
    return config


def build(name: str, folder: Path) -> Path:
    """Write a family's checkpoint without weights, at a GPU's sizes, and its chat template."""
    place = tiny_families(folder)[name].folder
    for weights in place.glob("*.safetensors*"):
        weights.unlink()
    path = place / "config.json"
    path.write_text(json.dumps(enlarged(json.loads(path.read_text()))))
    marks = marks_of(place)
    (place / "template.jinja").write_text(
        "{% for message in messages %}<|im_start|>user\n{% for part in message['content'] %}"
        f"{{% if part['type'] == 'video' %}}{marks['video']}"
        f"{{% elif part['type'] == 'image' %}}{marks['image']}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    return place


def make_plugins_findable(folder: Path) -> None:
    """Write entry points as an installation would have them, to be named by PYTHONPATH."""
    for name, text in ENTRY_POINTS.items():
        info = folder / f"{name}-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(text)


# One family.


def commands(name: str, model: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield commands and environments to try, one after the other."""
    command = [
        *(*SCISSOR, str(model), "--served-model-name=demo", f"--load-format={LOAD_FORMAT}"),
        *("--trust-remote-code", "--dtype=bfloat16", "--max-model-len=8192"),
        *("--max-num-seqs=32", "--max-num-batched-tokens=4096"),
        f"--chat-template={model / 'template.jinja'}",
        "--chat-template-content-format=openai",
    ]
    plugins = model.parent / "plugins"
    make_plugins_findable(plugins)
    paths = [str(plugins), str(Path.cwd()), *os.environ.get("PYTHONPATH", "").split(":")]
    environment = {"PYTHONPATH": ":".join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        yield [*command, "--enforce-eager"], environment | SMALL
        return
    command += GPU_OPTIONS
    if name.startswith(("qwen3_5", "interns2")):
        command.append("--gdn-prefill-backend=triton")
    yield [*command, f"--compilation-config={GRAPHS}"], environment | GPU_ENVIRONMENT
    yield [*command, "--enforce-eager"], environment | GPU_ENVIRONMENT


Parts = tuple[Path | str, ...]


def questions(folder: Path, *, has_pictures: bool) -> list[Parts]:
    """Return messages with one video each."""
    picture = folder / "picture.png"
    cv2.imwrite(str(picture), torch.arange(90 * 120 * 3).view(90, 120, 3).to(torch.uint8).numpy())
    made: list[Parts] = []
    for number in range(NUM_CLIPS):
        width, height, num_frames = SIZES[number % len(SIZES)]
        shown = [7 * number + frame for frame in range(num_frames)]
        clip = make_clip(
            folder / f"{number}.mp4",
            width=width,
            height=height,
            num_frames=num_frames,
            fps=8,
            shown=shown,
        )
        beside: Parts = (picture,) if has_pictures and number % 3 == 2 else ()
        made.append((*beside, clip, f"What is in clip {number}?"))
    return made


class Load:
    """Requests to one server, and what is wrong with their answers."""

    def __init__(self, server: Server, asked: list[Parts]) -> None:
        self._server = server
        self._asked = asked
        self._text: dict[Parts, int] = {}
        self._num_tokens: dict[Parts, int] = {}
        self.wrong: list[str] = []
        self.count: Counter[str] = Counter()

    def learn(self) -> None:
        """Ask about each clip at 1.0, one after the other: its N, and all tokens beside it."""
        for parts in self._asked:
            answer = self._server.ask(*parts, ratio=1.0, logprobs=False, top_logprobs=None)
            num_tokens = answer.video_compression["num_video_tokens"]
            self._num_tokens[parts] = num_tokens
            self._text[parts] = answer.usage.prompt_tokens - num_tokens
        if not all(count > 0 for count in [*self._num_tokens.values(), *self._text.values()]):
            self.wrong.append(f"counts at 1.0: {self._num_tokens}, {self._text}")

    def ask(self, parts: Parts, ratio: float) -> None:
        """Ask at a ratio, and check the number of tokens that reached the model."""
        try:
            answer = self._server.ask(*parts, ratio=ratio, logprobs=False, top_logprobs=None)
        except Exception as error:
            self.wrong.append(f"{parts[-1]} at {ratio}: {error}"[:500])
            return
        expected = num_retained_tokens(self._num_tokens[parts], ratio)
        kept = answer.usage.prompt_tokens - self._text[parts]
        told = answer.video_compression["num_retained_video_tokens"]
        if not kept == told == expected:
            self.wrong.append(f"{parts[-1]} at {ratio}: {kept} tokens, {told} told, not {expected}")
        if answer.usage.completion_tokens != 8:
            self.wrong.append(f"{parts[-1]} at {ratio}: {answer.usage.completion_tokens} answered")
        self.count[str(ratio)] += 1

    def run(self, concurrency: int, seconds: float) -> float:
        """Ask at mixed ratios, so many at a time, for so long; return the seconds it took."""
        pairs = list(
            islice(
                zip(cycle(self._asked), cycle([*RATIOS, *RATIOS[::-1], RATIOS[2]]), strict=False),
                10000,
            )
        )
        begin = time.monotonic()
        with ThreadPoolExecutor(concurrency) as pool:

            def ask(pair: tuple[Parts, float]) -> None:
                if time.monotonic() - begin < seconds and len(self.wrong) < 10:
                    self.ask(*pair)

            list(pool.map(ask, pairs))
        return time.monotonic() - begin


def serve_family(name: str, *, concurrency: int, seconds: float) -> dict[str, Any]:
    """Serve a family and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = build(name, place)
        config = json.loads((model / "config.json").read_text())
        row: dict[str, Any] = {"family": name, "architecture": config["architectures"][0]}
        asked = questions(place, has_pictures=bool(tiny_families(place)[name].mixed))
        for number, (command, variables) in enumerate(commands(name, model)):
            begin = time.monotonic()
            log = place / "log"
            try:
                with serving(command, variables, log) as server:
                    row["seconds_to_start"] = round(time.monotonic() - begin, 1)
                    row["cuda_graphs"] = torch.cuda.is_available() and number == 0
                    row |= _asked(server, asked, concurrency, seconds)
            except (Exception, SystemExit) as error:
                row["error"] = traceback.format_exc()[-6000:]
                if log.exists():
                    row["log"] = log.read_text(errors="replace")[-12000:]
                if isinstance(error, SystemExit):  # the time is over
                    break
            if not (row.get("wrong") or "error" in row):
                break
            if "seconds_to_start" in row:
                row["log"] = log.read_text(errors="replace")[-12000:]
                break
            row[f"error_{number}"] = row.pop("error")
    row["is_right"] = not row.get("wrong") and bool(row.get("requests"))
    return row


def _asked(
    server: Server, asked: list[Parts], concurrency: int, seconds: float
) -> Mapping[str, Any]:
    load = Load(server, asked)
    load.learn()
    taken = load.run(concurrency, seconds)
    total = sum(load.count.values())
    num_compressed = server.counter("scissor_vllm:video_stage_seconds_count", stage="compress")
    if not num_compressed:
        load.wrong.append("nothing was compressed")
    server.get("/health")
    return {
        "requests": total,
        "requests_per_second": round(total / taken, 2),
        "by_ratio": dict(load.count),
        "num_compressed": num_compressed,
        "preemptions": server.counter("vllm:num_preemptions_total"),
        "wrong": load.wrong,
    }


# All of them.


def serve_in_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Serve a family in a process of its own: builders draw from torch's global generator."""
    begin = time.monotonic()
    arguments = [f"--concurrency={args.concurrency}", f"--seconds={args.seconds}", "--row"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve_families", name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=args.limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, errors = process.communicate()
        errors += f"\nno row within {args.limit} s"
    try:
        row: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        row = {"family": name, "is_right": False, "error": (output + errors)[-12000:]}
    row["seconds"] = round(time.monotonic() - begin, 1)
    print(as_line(row), flush=True)
    return row


def as_line(row: Mapping[str, Any]) -> str:
    """Return a row of the printed table."""
    columns = [
        f"{row['family']:18}",
        "right" if row["is_right"] else "WRONG",
        f"{row.get('requests', 0):5} requests",
        f"{row.get('requests_per_second', 0):7} a second",
        f"start {row.get('seconds_to_start', '-')} s",
        f"whole {row.get('seconds', '-')} s",
    ]
    if not row["is_right"]:
        errors = [str(value) for key, value in row.items() if key.startswith("error")]
        columns.append(str([*row.get("wrong", ()), *errors])[-400:])
    return "  ".join(columns)


def main(argv: list[str] | None = None) -> int:
    """Serve families; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    everything = list(tiny_families(Path()))
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(everything))
    parser.add_argument("--output", type=Path, help="file for the rows")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--servers", type=int, default=8, help="at a time")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one family")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.families or everything
    if args.row:
        # Stops the server too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        row = serve_family(names[0], concurrency=args.concurrency, seconds=args.seconds)
        print(json.dumps(row), flush=True)
        return 0
    rows = []
    with ThreadPoolExecutor(args.servers) as pool:
        begun = [pool.submit(serve_in_process, name, args) for name in names]
        for row in map(Future.result, as_completed(begun)):
            rows.append(row)
            if args.output:
                write_json(args.output, {"environment": environment(), "rows": rows})
    return 0 if all(row["is_right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
