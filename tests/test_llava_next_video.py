"""LLaVA-NeXT-Video beside transformers, fed the same rows at the same positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scissor_vllm import num_retained_tokens
from scissor_vllm.compression.members import last_members
from scissor_vllm.models.frames import FramesModel
from scissor_vllm.show.encoder import Encoder
from tests.families import (
    SHORT,
    TALL,
    WIDE,
    Answer,
    Family,
    Media,
    Question,
    ask,
    largest_difference,
)
from tests.serving import compress_as_served


def video_tokens(family: Family, media: Media) -> torch.Tensor:
    """Return a video's tokens (T, P, D) as transformers makes them."""
    from transformers import AutoVideoProcessor

    frames = torch.from_numpy(media.pixels()).permute(0, 3, 1, 2)
    processor = AutoVideoProcessor.from_pretrained(family.folder)
    pixels = processor(videos=[frames], return_tensors="pt")["pixel_values_videos"]
    with torch.no_grad():
        rows: torch.Tensor = family.model.model.get_video_features(pixels).pooler_output[0]
    return rows.view(media.num_frames, -1, rows.shape[-1])


def logprobs_by_transformers(
    family: Family, question: Question, *, keeps_positions: bool, in_order: bool = False
) -> torch.Tensor:
    """Return the first step's log probabilities for a question about one video.

    Args:
        family: whose model is asked.
        question: about one video.
        keeps_positions: of the tokens in the uncompressed prompt.
        in_order: whether rows are in the order of their members at least.
    """
    from transformers import AutoTokenizer

    model = family.model
    (media,) = question.media
    tokens = video_tokens(family, media)
    rows, places = tokens.flatten(0, 1), torch.arange(tokens.shape[0] * tokens.shape[1])
    end = len(places)
    if question.ratio != 1.0:
        compressed = compress_as_served(tokens, num_retained_tokens(end, question.ratio or 1.0))
        rows, places = compressed.tokens, torch.arange(len(compressed.tokens))
        members, order = last_members(compressed).sort(stable=True)
        if keeps_positions or in_order:
            rows = rows[order]
        if keeps_positions:
            places = members
        else:
            end = len(rows)
    before, behind = question.prompt().split("<|video_pad|>")
    encode = AutoTokenizer.from_pretrained(family.folder).encode
    with torch.no_grad():
        embed = model.get_input_embeddings()
        text = [embed(torch.tensor(encode(each))) for each in (before, behind)]
        embeddings = torch.cat([text[0], rows, text[1]])[None]
        first, number = len(text[0]), torch.arange(len(text[0]) + len(text[1]))
        positions = torch.cat([number[:first], first + places, end + number[first:]])[None]
        hidden = model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions
        ).last_hidden_state
        return torch.log_softmax(model.lm_head(hidden[0, -1]).float(), -1)


def difference(answer: Answer, logprobs: torch.Tensor) -> float:
    """Return how far the likeliest tokens of an answer's first step are from what is expected."""
    return max(abs(value - float(logprobs[token])) for token, value in answer.first.items())


@pytest.mark.server
@pytest.mark.parametrize("keeps_positions", [False, True])
def test_transformers_fed_the_same_rows_agrees(
    families: dict[str, Family], keeps_positions: bool
) -> None:
    family = families["llava_next_video, positions kept" if keeps_positions else "llava_next_video"]
    for question in family.single:
        expected = logprobs_by_transformers(family, question, keeps_positions=keeps_positions)
        assert difference(family.whole[question], expected) < 1e-2, question


@pytest.mark.server
def test_the_ratio_and_the_positions_are_seen_in_an_answer(families: dict[str, Family]) -> None:
    family = families["llava_next_video, positions kept"]
    question = Question((WIDE,), 0.1)
    answer = family.whole[question]
    other = logprobs_by_transformers(family, Question((WIDE,), 0.5), keeps_positions=True)
    assert difference(answer, other) > 2e-2
    assert difference(answer, logprobs_by_transformers(family, question, keeps_positions=False)) > (
        2e-2
    )


@pytest.mark.server
def test_a_prompt_longer_than_the_language_model_knows_positions_for_keeps_none(
    families: dict[str, Family], tmp_path: Path
) -> None:
    family = families["llava_next_video, positions kept"]
    few = tmp_path / "few"
    shutil.copytree(family.folder, few)
    config = json.loads((few / "config.json").read_text())
    # Uncompressed the long one is 226 tokens, and behind its 54 at 0.1 there may come 74 more.
    config["text_config"]["max_position_embeddings"] = 256
    (few / "config.json").write_text(json.dumps(config))
    questions = [Question((WIDE,), 0.1), Question((SHORT,), 0.25)]
    rounds = ask(few, [questions], plugins="scissor_vllm", max_model_len=128, **family.options)
    kept = zip(rounds[0], questions, (False, True), strict=True)
    for answer, question, keeps_positions in kept:
        assert len(answer.tokens) == 6
        expected = logprobs_by_transformers(
            family, question, keeps_positions=keeps_positions, in_order=True
        )
        assert difference(answer, expected) < 1e-2, question


def test_an_answer_that_comes_to_the_last_position_stays_there() -> None:
    class Stock:
        def forward(self, _: None, positions: torch.Tensor, *others: object) -> torch.Tensor:
            return positions

    class Model(FramesModel, Stock):  # type: ignore[misc]
        pass

    model: Any = object.__new__(Model)
    model.keeps_positions, model._num_positions = True, 8
    buffer = torch.tensor([[3, 7, 8, 9]] * 3)
    given = model.forward(None, buffer)
    assert given.tolist() == [3, 7, 7, 7]
    assert given.data_ptr() == buffer.data_ptr()


@pytest.mark.server
def test_weights_named_as_transformers_saves_them_give_the_same_answers(
    families: dict[str, Family], tmp_path: Path
) -> None:
    family = families["llava_next_video"]
    question = Question((WIDE,), 0.25)
    expected = family.whole[question]
    resaved = tmp_path / "resaved"
    shutil.copytree(family.folder, resaved)
    weights = load_file(family.folder / "model.safetensors")
    assert any("vision_tower.vision_model." in name for name in weights)
    renamed = {name.replace(".vision_model.", "."): weight for name, weight in weights.items()}
    save_file(renamed, resaved / "model.safetensors", metadata={"format": "pt"})
    ((answer,),) = ask(resaved, [[question]], plugins="scissor_vllm", max_model_len=4096)
    assert largest_difference(answer, expected) < 1e-4


def test_show_draws_the_tokens_that_transformers_gives_a_video(families: dict[str, Family]) -> None:
    family = families["llava_next_video"]
    expected = video_tokens(family, TALL)
    made = Encoder(str(family.folder)).encode(TALL.pixels())
    assert made.tokens.shape[:2] == (7, made.rows * made.columns) == (7, 16)
    torch.testing.assert_close(made.tokens, expected, atol=1e-4, rtol=1e-4)
