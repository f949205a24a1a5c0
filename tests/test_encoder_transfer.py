"""Encoder disaggregation: one instance encodes and compresses, another answers from its rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from scissor_vllm import num_retained_tokens
from scissor_vllm.loadtest.process import free_port, running_server
from tests.conftest import NUM_FRAMES, TOKENS_PER_FRAME
from tests.families import Family, Question, ask, largest_difference
from tests.preloaded import SMALL
from tests.serving import SCISSOR, Server, same_answer, serving

pytestmark = pytest.mark.slow

NO_CACHES = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")


def transfer(role: str, folder: Path) -> dict[str, Any]:
    """Return ``--ec-transfer-config``: vLLM's example connector keeps rows as files in a folder."""
    return {
        "ec_connector": "ECExampleConnector",
        "ec_role": role,
        "ec_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def answers(family: Family, role: str, folder: Path, questions: list[Question]) -> list[Any]:
    """Return what a new instance answers to each question alone."""
    rounds = ask(
        family.folder,
        [[question] for question in questions],
        max_model_len=4096,
        enable_prefix_caching=False,
        max_num_batched_tokens=8192,
        ec_transfer_config=transfer(role, folder),
        **family.options,
    )
    return [answer for (answer,) in rounds]


@pytest.mark.parametrize(
    ("name", "role"),
    [("llava_next_video", "ec_producer"), ("qwen2_5_vl", "ec_producer"), ("qwen3_vl", "ec_both")],
)
def test_an_instance_answers_from_the_rows_of_another_as_from_its_own(
    name: str, role: str, families: dict[str, Family], tmp_path: Path
) -> None:
    family = families[name]
    questions = [*family.single, *family.several]
    answers(family, role, tmp_path, questions)
    files = list(tmp_path.rglob("*.safetensors"))
    # A video has a file at each ratio, and an image one.
    expected = {
        (media, question.ratio if media.num_frames else None)
        for question in questions
        for media in question.media
    }
    assert len(files) == len(expected)
    read = answers(family, "ec_consumer", tmp_path, questions)
    for question, answer in zip(questions, read, strict=True):
        assert largest_difference(answer, family.whole[question]) < 1e-5, question
    # They come from the files, not from a tower of its own.
    for file in files:
        save_file({"ec_cache": torch.zeros_like(load_file(file)["ec_cache"])}, file)
    question = Question(family.single[0].media, 0.25)
    (spoiled,) = answers(family, "ec_consumer", tmp_path, [question])
    assert largest_difference(spoiled, family.whole[question]) > 1e-3


@dataclass(frozen=True)
class Instances:
    """Two servers that share a folder of rows."""

    encodes: Server
    answers: Server
    rows: Path


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instances]:
    folder = tmp_path_factory.mktemp("instances")
    rows = folder / "rows"

    def server(role: str) -> AbstractContextManager[Server]:
        option = f"--ec-transfer-config={json.dumps(transfer(role, rows))}"
        command = (*SCISSOR, "demo", option, *NO_CACHES)
        return serving(command, SMALL, folder / f"{role}.log", preloaded=True)

    with server("ec_producer") as encodes, server("ec_consumer") as answers:
        yield Instances(encodes, answers, rows)


def num_compressed(server: Server) -> float:
    return server.counter("scissor_vllm:video_stage_seconds_count", stage="compress")


def test_servers_report_k_and_compress_a_video_once(
    clips: dict[str, Path], instances: Instances
) -> None:
    clip, question = clips["tall"], "What is it?"
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    encodes, answers = instances.encodes, instances.answers
    before = num_compressed(encodes)
    told = [encodes.ask(clip, question, ratio=0.1, logprobs=False, top_logprobs=None)]
    assert num_compressed(encodes) == before + 1
    for ratio, by_itself in ((0.1, 0), (0.5, 1)):
        before = num_compressed(answers)
        told.append(answers.ask(clip, question, ratio=ratio))
        assert num_compressed(answers) == before + by_itself
    for answer, ratio in zip(told, (0.1, 0.1, 0.5), strict=True):
        expected = num_retained_tokens(num_tokens, ratio)
        assert answer.video_compression["num_retained_video_tokens"] == expected


def test_behind_the_proxy_one_instance_encodes_and_the_other_answers(
    clips: dict[str, Path], instances: Instances, tmp_path: Path
) -> None:
    encodes, answers = instances.encodes, instances.answers
    command = [sys.executable, "-m", "bench.encoder_proxy", "--rows", str(instances.rows)]
    for name, server in (("encoder", encodes), ("decoder", answers)):
        command += [f"--{name}", f"http://127.0.0.1:{server.port}"]
    port, log = free_port(), tmp_path / "proxy.log"
    before = [num_compressed(server) for server in (encodes, answers)]
    files = set(instances.rows.rglob("*.safetensors"))
    ratios = {"long": 0.1, "tall": 0.25}
    with running_server("the proxy", command, port=port, log=log, timeout_seconds=60):
        proxy = Server(port, log, answers.process)
        told = {
            name: proxy.ask(clips[name], "What is it?", ratio=ratio)
            for name, ratio in ratios.items()
        }
        plain = proxy.ask("What is a video?")
        with pytest.raises(openai.BadRequestError, match="retention_ratio"):
            proxy.ask(clips["long"], ratio=2)
    assert plain.choices[0].message.content is not None
    assert [num_compressed(server) for server in (encodes, answers)] == [before[0] + 2, before[1]]
    assert set(instances.rows.rglob("*.safetensors")) == files
    for name, answer in told.items():
        # A budget of the same K has rows of its own, so the decoder encodes the video itself.
        kept = answer.video_compression["num_retained_video_tokens"]
        budget = {"max_retained_video_tokens": kept}
        alone = answers.ask(clips[name], "What is it?", extra_body={"ignore_eos": True, **budget})
        assert same_answer(answer, alone), name
    assert num_compressed(answers) == before[1] + 2
