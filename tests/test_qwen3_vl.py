"""Qwen3-VL: transformers fed our rows, text, positions, DeepStack (see ``test_transformers``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scissor_vllm import num_retained_tokens
from tests.families import FPS, WIDE, Media, Question, ask, build_qwen3_vl
from tests.serving import compress_as_served
from tests.test_positions import nearest_member


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
    num_retained = num_retained_tokens(len(tokens.flatten(0, 1)), question.ratio or 1.0)
    compressed = compress_as_served(tokens, num_retained)
    row_at: dict[int, list[int]] = {}
    place: int | None = 0
    for row in range(num_retained):
        member = place_of(tokens, compressed, row)
        place = place if member is None else member
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
    if num_retained == len(tokens.flatten(0, 1)):
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


def test_the_mixture_of_experts_agrees_with_transformers_as_well(tmp_path: Path) -> None:
    model = build_qwen3_vl(tmp_path, moe=True)
    questions = [Question((WIDE,), ratio) for ratio in (1.0, 0.25)]
    (answers,) = ask(tmp_path, [questions], max_model_len=4096)
    for question, answer in zip(questions, answers, strict=True):
        expected = logprobs_by_transformers(model, tmp_path, question)
        for token, logprob in answer.first.items():
            assert logprob == pytest.approx(float(expected[token]), abs=1e-2), question
