"""Each family on a real engine beside stock vLLM: exactly K tokens, and positions right whatever
vLLM does with a prompt. (Of LLaVA-OneVision, the demo's, ``test_server.py`` has most of them.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scissor_vllm import num_retained_tokens
from tests import engines
from tests.families import (
    FAMILIES,
    LARGE_STEPS,
    VARIANTS,
    Family,
    Question,
    ask,
    build_draft,
    build_with_mtp,
    largest_difference,
    largest_difference_to_a_tie,
    observe,
    quantize_language_model,
)

NUM_BEHIND = 24
"""Tokens of the prompt of ``Family.other`` behind its video."""


@pytest.fixture(
    params=[
        *FAMILIES,
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava_onevision", *VARIANTS)),
    ]
)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def test_ratio_one_answers_as_vllm_without_the_plugin(family: Family) -> None:
    for question, expected in family.stock.items():
        ratio = 1.0 if any(each.num_frames for each in question.media) else None
        answer = family.whole[Question(question.media, ratio)]
        assert largest_difference(answer, expected) == 0, question


def test_exactly_k_tokens_of_each_video_reach_the_model(family: Family) -> None:
    num_tokens, whole = family.num_tokens, family.whole
    for question in [*family.single, *family.several]:
        text_and_pictures = whole[Question(question.media, 1.0)].num_prompt_tokens - sum(
            num_tokens.get(media, 0) for media in question.media
        )
        kept = [
            num_retained_tokens(num_tokens[media], question.ratio or 1.0)
            for media in question.media
            if media.num_frames
        ]
        assert whole[question].num_prompt_tokens == text_and_pictures + sum(kept), question


def test_chunked_prefill_and_mixed_ratios_at_once_answer_as_one_step_alone(
    family: Family,
) -> None:
    questions = [*family.single, *family.several]
    for question, answer in zip(questions, family.chunked[0], strict=True):
        assert largest_difference(answer, family.whole[question]) < family.tolerance, question


NO_STATES = "vLLM's Mamba2 kernel for CPUs returns no states to cache"


def test_a_prefix_found_in_part_or_in_full_answers_as_none_found(family: Family) -> None:
    if not family.caches_prefixes:
        pytest.skip(NO_STATES)
    again = [*family.single, *family.several][::-1]
    for questions, answers in ((again, family.chunked[1]), (family.several, family.chunked[2])):
        for question, answer in zip(questions, answers, strict=True):
            assert largest_difference(answer, family.whole[question]) < family.tolerance, question
        num_cached = sum(answer.num_cached_tokens for answer in answers)
        assert not questions or num_cached > 0


def test_a_prefix_that_ends_within_a_video_answers_as_none_found(family: Family) -> None:
    if not family.caches_prefixes:
        pytest.skip(NO_STATES)
    if family.chunk == LARGE_STEPS and torch.cpu._is_avx512_bf16_supported():
        pytest.skip("on this CPU a block of float32 states is longer than the prompt")
    (answer,) = family.chunked[4]
    assert 64 < answer.num_cached_tokens < answer.num_prompt_tokens - NUM_BEHIND
    assert largest_difference(answer, family.whole[family.other]) < family.tolerance


PREEMPTED = (
    *("llava_onevision", "llava_next_video", "qwen2_vl", "qwen3_vl"),
    *("glm4v", "internvl", "gemma4"),
)
"""Beside Qwen2.5-VL. A prompt of Qwen3.5 or Nemotron fits one block of hundreds of tokens, which
never has to grow."""


@pytest.mark.parametrize(
    "family",
    ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in PREEMPTED)],
    indirect=True,
)
def test_preempted_and_guessed_tokens_are_those_of_a_request_alone(family: Family) -> None:
    # The blocks hold the longest prompt and little more; guesses come from the prompt.
    questions = [each for each in [*family.single, *family.several] if each.ratio != 1.0]
    longest = max(family.whole[question].num_prompt_tokens for question in questions)
    num_blocks = -(-(longest + family.num_answered) // 32) + 1
    observed = observe(
        family.folder,
        [questions],
        max_model_len=32 * num_blocks,
        enable_prefix_caching=False,
        block_size=32,
        # vLLM keeps a block for itself.
        num_gpu_blocks_override=num_blocks * family.num_cache_groups + 1,
        max_num_batched_tokens=128,
        scheduler_reserve_full_isl=False,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 2,
        },
        disable_log_stats=False,
        **family.options,
    )
    assert observed.counters["num_preemptions"] > 0
    assert observed.counters["spec_decode_num_draft_tokens"] > 0
    for question, answer in zip(questions, observed.answers[0], strict=True):
        assert largest_difference(answer, family.whole[question]) < 1e-4, question


@pytest.mark.parametrize(
    "family", ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)], indirect=True
)
def test_a_draft_model_that_reads_the_same_rows_changes_no_answer(
    family: Family, tmp_path: Path
) -> None:
    build_draft(tmp_path / "draft", family.folder)
    questions = [each for each in [*family.single, *family.several] if each.ratio != 1.0]
    observed = observe(
        family.folder,
        [questions],
        max_model_len=4096,
        enable_prefix_caching=False,
        block_size=32,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        speculative_config={
            "method": "eagle3",
            "model": str(tmp_path / "draft"),
            "num_speculative_tokens": 2,
        },
        disable_log_stats=False,
    )
    assert observed.counters["spec_decode_num_draft_tokens"] > 0
    for question, answer in zip(questions, observed.answers[0], strict=True):
        assert largest_difference(answer, family.whole[question]) < 1e-4, question


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"], indirect=True)
def test_a_layer_that_predicts_two_tokens_reads_the_same_rows_and_changes_no_answer(
    family: Family, tmp_path: Path
) -> None:
    build_with_mtp(tmp_path / "mtp", family.folder)
    questions = [each for each in [*family.single, *family.several] if each.ratio != 1.0]
    observed = observe(
        tmp_path / "mtp",
        [questions],
        max_model_len=4096,
        enable_prefix_caching=False,
        max_num_seqs=8,
        num_tokens=family.num_answered,
        speculative_config={"method": "mtp", "num_speculative_tokens": 2},
        disable_log_stats=False,
        **{**family.options, **family.chunk},
    )
    assert observed.counters["spec_decode_num_draft_tokens"] > 0
    for question, answer in zip(questions, observed.answers[0], strict=True):
        alone = family.whole[question]
        assert largest_difference_to_a_tie(answer, alone) < family.tolerance, question


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_a_quantized_language_model_answers_as_stocks_and_in_a_batch_as_alone(
    family: Family, tmp_path: Path
) -> None:
    model = tmp_path / "int8"
    quantize_language_model(model, family.folder)
    questions = [*family.single, *family.several]
    whole = [each for each in family.single if each.ratio == 1.0]
    options: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 8192}
    stock = ask(model, [[replace(each, ratio=None)] for each in whole], stock=True, **options)
    *alone, together = ask(model, [*([each] for each in questions), questions], **options)
    for question, (answer,), in_batch in zip(questions, alone, together, strict=True):
        plain = family.whole[question]
        assert answer.num_prompt_tokens == plain.num_prompt_tokens, question
        assert largest_difference(answer, plain) > 1e-3, question
        assert largest_difference(answer, in_batch) < 1e-4, question
    of_question = dict(zip(questions, alone, strict=True))
    for question, (expected,) in zip(whole, stock, strict=True):
        assert largest_difference(of_question[question][0], expected) == 0, question


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_a_compiled_language_model_answers_as_an_eager_one(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines.ENVIRONMENT, "TORCHDYNAMO_DISABLE", "0")
    # Nothing that an earlier run compiled.
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT"):
        monkeypatch.setitem(engines.ENVIRONMENT, variable, str(tmp_path))
    questions = [*family.single, *family.several]
    # No other test's engine has this environment.
    engines.stop_children()
    try:
        (answers,) = ask(
            family.folder,
            [questions],
            max_model_len=4096,
            max_num_batched_tokens=8192,
            enforce_eager=False,
        )
    finally:
        engines.stop_children()
    assert list(tmp_path.rglob("*.so"))
    for question, answer in zip(questions, answers, strict=True):
        assert largest_difference(answer, family.whole[question]) < 1e-4, question


@pytest.mark.slow
@pytest.mark.parametrize("encoder_mode", ["weights", "data"])
@pytest.mark.parametrize("family", ["llava_next_video", "qwen3_vl"], indirect=True)
def test_two_ranks_of_tensor_parallelism_answer_as_one(family: Family, encoder_mode: str) -> None:
    # Each rank computes half of the heads over its own rows: other rows in one are other answers.
    # In the tower, "data" has each rank encode half of a compressed video's frames.
    questions = [*family.single, *family.several]
    (answers,) = ask(
        family.folder,
        [questions],
        max_model_len=4096,
        enable_prefix_caching=False,
        max_num_batched_tokens=8192,
        tensor_parallel_size=2,
        mm_encoder_tp_mode=encoder_mode,
        distributed_executor_backend="mp",
    )
    for question, answer in zip(questions, answers, strict=True):
        assert largest_difference(answer, family.whole[question]) < 1e-4, question
