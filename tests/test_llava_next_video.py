"""LLaVA-NeXT-Video: transformers fed our rows (see ``test_transformers``), weights, pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from scissor_vllm import num_retained_tokens
from scissor_vllm.show.encoder import Encoder
from tests.families import (
    TALL,
    WIDE,
    Family,
    Media,
    Question,
    ask,
    first_step_difference,
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


def logprobs_by_transformers(family: Family, question: Question) -> torch.Tensor:
    """Return the first step's log probabilities for a question about one video."""
    from transformers import AutoTokenizer

    model = family.model
    (media,) = question.media
    tokens = video_tokens(family, media)
    rows = tokens.flatten(0, 1)
    if question.ratio != 1.0:
        num_retained = num_retained_tokens(len(rows), question.ratio or 1.0)
        rows = compress_as_served(tokens, num_retained).tokens
    before, behind = question.prompt().split("<|video_pad|>")
    encode = AutoTokenizer.from_pretrained(family.folder).encode
    with torch.no_grad():
        embed = model.get_input_embeddings()
        text = [embed(torch.tensor(encode(part))) for part in (before, behind)]
        embeddings = torch.cat([text[0], rows, text[1]])[None]
        hidden = model.model.language_model(
            inputs_embeds=embeddings, position_ids=torch.arange(embeddings.shape[1])[None]
        ).last_hidden_state
        return torch.log_softmax(model.lm_head(hidden[0, -1]).float(), -1)


def test_the_ratio_is_seen_in_an_answer(families: dict[str, Family]) -> None:
    family = families["llava_next_video"]
    answer = family.whole[Question((WIDE,), 0.1)]
    other = logprobs_by_transformers(family, Question((WIDE,), 0.5))
    assert first_step_difference(answer, other) > 2e-2


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
    ((answer,),) = ask(resaved, [[question]], max_model_len=4096)
    assert largest_difference(answer, expected) < 1e-4


def test_show_draws_the_tokens_that_transformers_gives_a_video(families: dict[str, Family]) -> None:
    family = families["llava_next_video"]
    expected = video_tokens(family, TALL)
    shown = Encoder(str(family.folder)).encode(TALL.pixels())
    assert shown.tokens.shape[:2] == (7, shown.rows * shown.columns) == (7, 16)
    torch.testing.assert_close(shown.tokens, expected, atol=1e-4, rtol=1e-4)
