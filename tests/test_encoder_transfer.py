"""Encoder disaggregation: one instance encodes and compresses, another answers from its rows."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scissor_vllm import num_retained_tokens
from tests.conftest import NUM_FRAMES, TOKENS_PER_FRAME
from tests.families import Family, Question, ask, largest_difference
from tests.preloaded import SMALL
from tests.serving import SCISSOR, Server, serving

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


def test_servers_report_k_and_compress_a_video_once(clips: dict[str, Path], tmp_path: Path) -> None:
    def server(role: str) -> AbstractContextManager[Server]:
        option = f"--ec-transfer-config={json.dumps(transfer(role, tmp_path / 'rows'))}"
        command = (*SCISSOR, "demo", option, "--no-enable-prefix-caching")
        return serving(command, SMALL, tmp_path / f"{role}.log", preloaded=True)

    def num_compressed(server: Server) -> float:
        return server.counter("scissor_vllm:video_stage_seconds_count", stage="compress")

    clip, question = clips["tall"], "What is it?"
    num_tokens = NUM_FRAMES["tall"] * TOKENS_PER_FRAME
    with server("ec_producer") as encodes:
        answer = encodes.ask(clip, question, ratio=0.1, logprobs=False, top_logprobs=None)
        assert num_compressed(encodes) == 1
    told = [answer]
    with server("ec_consumer") as answers:
        for ratio, by_itself in ((0.1, 0), (0.5, 1)):
            told.append(answers.ask(clip, question, ratio=ratio))
            assert num_compressed(answers) == by_itself
    for answer, ratio in zip(told, (0.1, 0.1, 0.5), strict=True):
        expected = num_retained_tokens(num_tokens, ratio)
        assert answer.video_compression["num_retained_video_tokens"] == expected
