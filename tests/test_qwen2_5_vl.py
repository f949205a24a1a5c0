"""Qwen2.5-VL: transformers fed our rows and positions (see ``test_transformers``), embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scissor_vllm import num_retained_tokens
from tests.families import FPS, Family, Media, Question, ask, largest_difference
from tests.serving import compress_as_served
from tests.test_positions import nearest_member


def features_and_grid(model: Any, folder: Path, media: Media) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a video's tokens (T, P, D) and its grid as transformers makes them."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    frames = torch.from_numpy(media.pixels()).permute(0, 3, 1, 2)
    inputs = processor.video_processor(videos=[frames], return_tensors="pt")
    grid = inputs["video_grid_thw"]
    with torch.no_grad():
        output = model.model.get_video_features(inputs["pixel_values_videos"], grid)
    (tokens,) = output.pooler_output
    return tokens.view(int(grid[0, 0]), -1, tokens.shape[-1]), grid


def video_positions(grid: list[int], start: int, length: int) -> torch.Tensor:
    """Return (3, n) for a prompt with one video, by the rule: two positions a second, and text
    behind the video behind all of it.

    (transformers 5 goes on max(height, width) behind the video's beginning, where a long video
    still is.)
    """
    num_frames, height, width = grid[0], grid[1] // 2, grid[2] // 2
    tokens_per_second, frames_per_patch = 2, 2
    interval = tokens_per_second * frames_per_patch / FPS
    video = [
        (start + int(t * interval), start + h, start + w)
        for t in range(num_frames)
        for h in range(height)
        for w in range(width)
    ]
    behind = max(max(axis) for axis in video) + 1
    num_behind = length - start - len(video)
    text = [(n,) * 3 for n in [*range(start), *range(behind, behind + num_behind)]]
    return torch.tensor([*text[:start], *video, *text[start:]]).T


def logprobs_by_transformers(
    model: Any, folder: Path, question: Question, place_of: Any = nearest_member
) -> torch.Tensor:
    """Return the first step's log probabilities for a question about one video."""
    from transformers import AutoTokenizer

    (media,) = question.media
    tokens, grid = features_and_grid(model, folder, media)
    num_tokens = tokens.shape[0] * tokens.shape[1]
    num_retained = num_retained_tokens(num_tokens, question.ratio or 1.0)
    compressed = compress_as_served(tokens, num_retained)
    places = [place_of(tokens, compressed, row) for row in range(num_retained)]
    for row, place in enumerate(places):
        if place is None:
            places[row] = places[row - 1] if row else 0
    order = sorted(range(num_retained), key=lambda row: places[row])

    pad = model.config.video_token_id
    prompt = AutoTokenizer.from_pretrained(folder).encode(question.prompt())
    start = prompt.index(pad)
    full = torch.tensor([[*prompt[:start], *[pad] * num_tokens, *prompt[start + 1 :]]])
    positions = video_positions(grid[0].tolist(), start, full.shape[1])
    behind = range(start + num_tokens, full.shape[1])
    kept = [*range(start), *(start + places[row] for row in order), *behind]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(full[:, kept])
        embeddings[0, start : start + num_retained] = compressed.tokens[order]
        hidden = model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions[:, None, kept]
        ).last_hidden_state
        return torch.log_softmax(model.lm_head(hidden[0, -1]).float(), -1)


def test_precomputed_embeddings_of_videos_of_unlike_shapes_answer_as_the_videos(
    families: dict[str, Family], tmp_path: Path
) -> None:
    family = families["qwen2_5_vl"]
    rounds = []
    for number, media in enumerate(family.num_tokens):
        tokens, grid = features_and_grid(family.model, family.folder, media)
        path = tmp_path / f"{number}.safetensors"
        save_file({"video_embeds": tokens.flatten(0, 1), "video_grid_thw": grid}, path)
        rounds.append([Question((media,), embeddings=str(path))])
    answers = ask(family.folder, rounds, max_model_len=4096, enable_mm_embeds=True)
    for media, (answer,) in zip(family.num_tokens, answers, strict=True):
        # transformers' tower and vLLM's differ by float32's rounding.
        whole = family.whole[Question((media,), 1.0)]
        assert largest_difference(answer, whole) < 1e-2, media
