"""Qwen3-VL on a real engine, beside stock vLLM and beside transformers: text and DeepStack too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scissor_vllm import compress, num_retained_tokens
from tests.qwen_vl import (
    FPS,
    Answer,
    Media,
    Question,
    ask,
    build_draft,
    build_qwen3_vl,
    largest_difference,
    observe,
)
from tests.test_positions import nearest_member

WIDE, TALL, SHORT = Media(320, 200, 12, 1), Media(120, 400, 7, 2), Media(160, 160, 2, 3)
PICTURE = Media(200, 120, 0, 4)
NUM_TOKENS = {WIDE: 6 * 60, TALL: 4 * 48, SHORT: 25}
"""A temporal patch holds two frames; the seventh of TALL is doubled. Their sizes in tokens are
10 x 6, 4 x 12, and 5 x 5."""

RATIOS = (1.0, 0.5, 0.25, 0.1, 0.01)
SINGLE = [Question((media,), ratio) for media in NUM_TOKENS for ratio in RATIOS]
SEVERAL = [Question((WIDE, PICTURE, SHORT, TALL), ratio) for ratio in (1.0, 0.25, 0.05)]
OTHER = Question((WIDE,), 0.5, "Who is it?")
NUM_BEHIND = 24
"""Tokens of its prompt behind the video."""
PLAIN = [Question((PICTURE,)), Question(())]
STOCK = [*(Question((media,)) for media in NUM_TOKENS), Question(SEVERAL[0].media), *PLAIN]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny model's folder and transformers' model."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    return folder, build_qwen3_vl(folder)


def answers_of(folder: Path, questions: list[Question], **options: Any) -> dict[Question, Answer]:
    """Return what an engine answers to each question alone."""
    rounds = ask(folder, [[question] for question in questions], max_model_len=4096, **options)
    return {question: answer for question, (answer,) in zip(questions, rounds, strict=True)}


@pytest.fixture(scope="module")
def stock(checkpoint: tuple[Path, Any]) -> dict[Question, Answer]:
    """What vLLM answers without any plugin."""
    return answers_of(checkpoint[0], STOCK, plugins="", enable_prefix_caching=False)


@pytest.fixture(scope="module")
def whole(checkpoint: tuple[Path, Any]) -> dict[Question, Answer]:
    """What ours answers to each question alone, in one step and without a prefix cache."""
    return answers_of(
        checkpoint[0],
        [*SINGLE, *SEVERAL, *PLAIN, OTHER],
        plugins="scissor_vllm",
        enable_prefix_caching=False,
        max_num_batched_tokens=8192,
    )


@pytest.fixture(scope="module")
def chunked(checkpoint: tuple[Path, Any]) -> list[list[Answer]]:
    """What ours answers in steps of 64 tokens with a prefix cache: all together, again in another
    order, again alone, and one that asks otherwise about the same video.
    """
    rounds = [[*SINGLE, *SEVERAL], [*SEVERAL, *SINGLE], SEVERAL, [OTHER]]
    return ask(
        checkpoint[0],
        rounds,
        plugins="scissor_vllm",
        max_model_len=4096,
        enable_prefix_caching=True,
        block_size=32,
        max_num_batched_tokens=64,
        max_num_seqs=16,
    )


@pytest.mark.server
def test_ratio_one_answers_as_vllm_without_the_plugin(
    stock: dict[Question, Answer], whole: dict[Question, Answer]
) -> None:
    for question, expected in stock.items():
        ratio = 1.0 if any(each.num_frames for each in question.media) else None
        answer = whole[Question(question.media, ratio)]
        assert largest_difference(answer, expected) < 1e-5, question


@pytest.mark.server
def test_exactly_k_tokens_of_each_video_reach_the_model(whole: dict[Question, Answer]) -> None:
    for question in [*SINGLE, *SEVERAL]:
        text_and_pictures = whole[Question(question.media, 1.0)].num_prompt_tokens - sum(
            NUM_TOKENS.get(media, 0) for media in question.media
        )
        kept = [
            num_retained_tokens(NUM_TOKENS[media], question.ratio or 1.0)
            for media in question.media
            if media.num_frames
        ]
        assert whole[question].num_prompt_tokens == text_and_pictures + sum(kept), question


@pytest.mark.server
def test_chunked_prefill_and_mixed_ratios_at_once_answer_as_one_step_alone(
    chunked: list[list[Answer]], whole: dict[Question, Answer]
) -> None:
    for question, answer in zip([*SINGLE, *SEVERAL], chunked[0], strict=True):
        assert largest_difference(answer, whole[question]) < 1e-4, question


@pytest.mark.server
def test_a_prefix_found_in_part_or_in_full_answers_as_none_found(
    chunked: list[list[Answer]], whole: dict[Question, Answer]
) -> None:
    for questions, answers in (([*SEVERAL, *SINGLE], chunked[1]), (SEVERAL, chunked[2])):
        for question, answer in zip(questions, answers, strict=True):
            assert largest_difference(answer, whole[question]) < 1e-4, question
        assert sum(answer.num_cached_tokens for answer in answers) > 0


@pytest.mark.server
def test_a_prefix_that_ends_within_a_video_answers_as_none_found(
    chunked: list[list[Answer]], whole: dict[Question, Answer]
) -> None:
    (answer,) = chunked[3]
    assert 64 < answer.num_cached_tokens < answer.num_prompt_tokens - NUM_BEHIND
    assert largest_difference(answer, whole[OTHER]) < 1e-4


@pytest.mark.server
def test_preempted_and_guessed_tokens_are_those_of_a_request_alone(
    checkpoint: tuple[Path, Any], whole: dict[Question, Answer]
) -> None:
    # 23 blocks of 32 tokens hold a few of them at a time; guesses come from the prompt.
    questions = [each for each in [*SINGLE, *SEVERAL] if each.ratio != 1.0]
    observed = observe(
        checkpoint[0],
        [questions],
        plugins="scissor_vllm",
        max_model_len=704,
        enable_prefix_caching=False,
        block_size=32,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=256,
        scheduler_reserve_full_isl=False,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 2,
        },
        disable_log_stats=False,
    )
    assert observed.counters["num_preemptions"] > 0
    assert observed.counters["spec_decode_num_accepted_tokens"] > 0
    for question, answer in zip(questions, observed.answers[0], strict=True):
        assert largest_difference(answer, whole[question]) < 1e-4, question


@pytest.mark.server
def test_a_draft_model_that_reads_the_same_rows_changes_no_answer(
    checkpoint: tuple[Path, Any], whole: dict[Question, Answer], tmp_path: Path
) -> None:
    build_draft(tmp_path / "draft", checkpoint[0])
    questions = [each for each in [*SINGLE, *SEVERAL] if each.ratio != 1.0]
    observed = observe(
        checkpoint[0],
        [questions],
        plugins="scissor_vllm",
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
        assert largest_difference(answer, whole[question]) < 1e-4, question


# Beside transformers.


def features_and_grid(
    model: Any, folder: Path, media: Media
) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """Return a video's tokens (T, P, D), its DeepStack features (N, D) each, and its grid."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    frames = torch.from_numpy(media.pixels()).permute(0, 3, 1, 2)
    inputs = processor.video_processor(videos=[frames], return_tensors="pt", do_sample_frames=False)
    grid = inputs["video_grid_thw"]
    with torch.no_grad():
        output = model.model.get_video_features(inputs["pixel_values_videos"], grid)
    (tokens,) = output.pooler_output
    deepstack = [features for (features,) in output.deepstack_features]
    num_frames, height, width = grid[0].tolist()
    tokens = tokens.view(num_frames, -1, tokens.shape[-1])
    return tokens, deepstack, [num_frames, height // 2, width // 2]


def frame_times(media: Media) -> list[str]:
    """Return the text before each pair of frames: the mean of their times."""
    times = [number / FPS for number in range(media.num_frames)]
    times += [times[-1]] * (len(times) % 2)
    return [
        f"<{(first + second) / 2:.1f} seconds>"
        for first, second in zip(times[::2], times[1::2], strict=True)
    ]


def prompt_with_positions(
    tokenizer: Any, question: Question, grid: list[int]
) -> list[tuple[int, tuple[int, int, int], int | None]]:
    """Return the uncompressed prompt: each token, its position, and which of the video's it is."""
    (media,) = question.media
    special = tokenizer.convert_tokens_to_ids
    before, behind = question.prompt().split("<|video_pad|>")
    num_frames, height, width = grid
    prompt: list[tuple[int, tuple[int, int, int], int | None]] = []
    at = 0

    def say(text: str) -> None:
        nonlocal at
        for token in tokenizer.encode(text):
            prompt.append((token, (at, at, at), None))
            at += 1

    say(before)
    for frame, time in zip(range(num_frames), frame_times(media), strict=True):
        say(f"{time}<|vision_start|>")
        for h in range(height):
            for w in range(width):
                number = (frame * height + h) * width + w
                prompt.append((special("<|video_pad|>"), (at, at + h, at + w), number))
        at += max(height, width)
        say("<|vision_end|>")
    say(behind)
    return prompt


def logprobs_by_transformers(
    model: Any, folder: Path, question: Question, place_of: Any = nearest_member
) -> torch.Tensor:
    """Return the first step's log probabilities for a question about one video."""
    from transformers import AutoTokenizer

    (media,) = question.media
    tokens, deepstack, grid = features_and_grid(model, folder, media)
    num_retained = num_retained_tokens(NUM_TOKENS[media], question.ratio or 1.0)
    compressed = compress(tokens, num_retained=num_retained)
    row_at: dict[int, list[int]] = {}
    place: int | None = 0
    for row in range(num_retained):
        found = place_of(tokens, compressed, row)
        place = place if found is None else found
        row_at.setdefault(place or 0, []).append(row)

    kept = [
        (token, position, row)
        for token, position, number in prompt_with_positions(
            AutoTokenizer.from_pretrained(folder), question, grid
        )
        for row in ([None] if number is None else row_at.get(number, []))
    ]
    is_video = torch.tensor([row is not None for _, _, row in kept])
    rows = [row for _, _, row in kept if row is not None]
    if num_retained == NUM_TOKENS[media]:
        shared = deepstack
    else:
        members = [(compressed.assignment == row).nonzero().flatten() for row in range(len(rows))]
        shared = [torch.stack([level[of].mean(0) for of in members]) for level in deepstack]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor([[token for token, _, _ in kept]]))
        embeddings[0, is_video] = compressed.tokens[rows]
        hidden = model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=torch.tensor([position for _, position, _ in kept]).T[:, None],
            visual_pos_masks=is_video[None],
            deepstack_visual_embeds=[level[rows] for level in shared],
        ).last_hidden_state
        return torch.log_softmax(model.lm_head(hidden[0, -1]).float(), -1)


@pytest.mark.server
def test_transformers_fed_the_same_rows_and_positions_agrees(
    checkpoint: tuple[Path, Any], whole: dict[Question, Answer]
) -> None:
    folder, model = checkpoint
    for question in SINGLE:
        expected = logprobs_by_transformers(model, folder, question)
        for token, logprob in whole[question].first.items():
            assert logprob == pytest.approx(float(expected[token]), abs=1e-2), question


@pytest.mark.server
def test_other_positions_would_be_seen(
    checkpoint: tuple[Path, Any], whole: dict[Question, Answer]
) -> None:
    folder, model = checkpoint

    def first_member(tokens: torch.Tensor, compressed: Any, row: int) -> int | None:
        members = (compressed.assignment == row).nonzero().flatten().tolist()
        return members[0] if members else None

    question = Question((WIDE,), 0.1)
    other = logprobs_by_transformers(model, folder, question, first_member)
    answer = whole[question].first
    assert max(abs(value - float(other[token])) for token, value in answer.items()) > 2e-2


@pytest.mark.server
def test_the_mixture_of_experts_agrees_with_transformers_as_well(tmp_path: Path) -> None:
    model = build_qwen3_vl(tmp_path, moe=True)
    questions = [Question((WIDE,), ratio) for ratio in (1.0, 0.25)]
    for question, answer in answers_of(tmp_path, questions, plugins="scissor_vllm").items():
        expected = logprobs_by_transformers(model, tmp_path, question)
        for token, logprob in answer.first.items():
            assert logprob == pytest.approx(float(expected[token]), abs=1e-2), question
