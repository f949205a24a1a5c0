"""Encoder disaggregation: one instance encodes and compresses, another answers from its rows."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
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


def instance(role: str, folder: Path, *options: str) -> AbstractContextManager[Server]:
    """Return a server of the demo model that is started as it is entered."""
    option = f"--ec-transfer-config={json.dumps(transfer(role, folder / 'rows'))}"
    command = (*SCISSOR, "demo", option, "--no-enable-prefix-caching", *options)
    return serving(command, SMALL, folder / f"{role}.log", preloaded=True)


def num_compressed(server: Server) -> float:
    return server.counter("scissor_vllm:video_stage_seconds_count", stage="compress")


def test_servers_report_k_and_compress_a_video_once(clips: dict[str, Path], tmp_path: Path) -> None:
    clip, question = clips["tall"], "What is it?"
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    with instance("ec_producer", tmp_path) as encodes:
        answer = encodes.ask(clip, question, ratio=0.1, logprobs=False, top_logprobs=None)
        assert num_compressed(encodes) == 1
    told = [answer]
    with instance("ec_consumer", tmp_path) as answers:
        for ratio, by_itself in ((0.1, 0), (0.5, 1)):
            told.append(answers.ask(clip, question, ratio=ratio))
            assert num_compressed(answers) == by_itself
    for answer, ratio in zip(told, (0.1, 0.1, 0.5), strict=True):
        expected = num_retained_tokens(num_tokens, ratio)
        assert answer.video_compression["num_retained_video_tokens"] == expected


def test_behind_the_proxy_one_instance_encodes_and_the_other_answers(
    clips: dict[str, Path], tmp_path: Path
) -> None:
    question, ratios = "What is it?", {"long": 0.1, "tall": 0.25}
    port, log, rows = free_port(), tmp_path / "proxy.log", tmp_path / "rows"
    no_cache = ("--mm-processor-cache-gb", "0")
    with (
        instance("ec_producer", tmp_path, *no_cache) as encodes,
        instance("ec_consumer", tmp_path, *no_cache) as answers,
    ):
        # Without caches vLLM numbers videos by arrival: the decoder is two ahead of the encoder.
        alone = {name: answers.ask(clips[name], question, ratio=ratios[name]) for name in ratios}
        command = [sys.executable, "-m", "bench.encoder_proxy", "--rows", str(rows)]
        command += ["--encoder", f"http://127.0.0.1:{encodes.port}"]
        command += ["--decoder", f"http://127.0.0.1:{answers.port}"]
        with running_server("the proxy", command, port=port, log=log, timeout_seconds=60):
            proxy = Server(port, log, answers.process)
            with ThreadPoolExecutor() as threads:
                asked = {
                    name: threads.submit(proxy.ask, clips[name], question, ratio=ratios[name])
                    for name in reversed(ratios)
                }
            told = {name: answer.result() for name, answer in asked.items()}
            plain = proxy.ask("What is a video?")
            with pytest.raises(openai.BadRequestError, match="retention_ratio"):
                proxy.ask(clips["long"], ratio=2)
        assert (num_compressed(encodes), num_compressed(answers)) == (2, 2)
    assert plain.choices[0].message.content is not None
    for name, answer in told.items():
        assert same_answer(answer, alone[name]), name
    assert not list(rows.rglob("*.safetensors"))
