"""Positions of a compressed video's tokens in the uncompressed prompt, for models with M-RoPE.

A merged token stands at the (t, h, w) of one of the video's own tokens, which is known only once
the video was encoded. Everything else in a prompt stands where it does in the uncompressed prompt:
the text behind a video goes on behind the whole video, whatever was merged. So there are two parts:

- Before anything is encoded, a prompt's positions are those of the prompt as it would be
  uncompressed, less the tokens that are not there (:func:`uncompressed`). What a video holds plays
  no part, so a prefix cache may be hit in any place, by a video that this worker never encoded.
- A video's rows carry their own positions behind their values (:func:`with_positions`). They come
  out of the encoder's cache wherever a row is computed, whole or in part, and are written into the
  prompt's positions then (:func:`placed`).

Rows are cached in the model's dtype, in which bfloat16 holds no integer above 256 exactly: the
integers' own bits travel, as values that nothing computes with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from scissor_vllm.compression.selection import evenly_spaced


@dataclass(frozen=True)
class VideoPlace:
    """How a video's placeholders lie in a prompt, and where the text behind it stands."""

    num_rows: int
    """Placeholders of the video, of which some may stand for text within it."""
    first_pad: int
    """The number of its first video token among them."""
    num_pads: int
    """How many video tokens follow each other there."""
    end: int
    """The first position behind the video, counted from its beginning."""


@dataclass(frozen=True)
class CarriedPositions:
    """What some consecutive rows of one video carry, in host memory."""

    first_row: int
    """The number of the first of them in its video."""
    positions: torch.Tensor
    """(3, n) int64, counted from the video's beginning."""
    place: VideoPlace
    """The video's."""

    def __len__(self) -> int:
        return self.positions.shape[1]


def with_positions(rows: torch.Tensor, positions: torch.Tensor, place: VideoPlace) -> torch.Tensor:
    """Return all rows of a video with their positions behind their values, (K, D + fields).

    Args:
        rows: (K, D) floating.
        positions: (3, K) integer on the same device, counted from the video's beginning.
        place: of the video.
    """
    number = torch.arange(len(rows), device=rows.device)
    same = [torch.full_like(number, value) for value in astuple(place)]
    fields = torch.stack([number, *positions, *same], dim=1)
    return torch.cat([rows, fields.to(torch.int32).view(rows.dtype)], dim=1)


def carried_positions(rows: torch.Tensor, width: int) -> CarriedPositions | None:
    """Return what rows of ``width`` values carry behind them, None for nothing.

    Waits for the device.
    """
    if rows.shape[1] == width or len(rows) == 0:
        return None
    fields = rows[:, width:].cpu().contiguous().view(torch.int32).long()
    number, *place = (int(value) for value in fields[0, [0, 4, 5, 6, 7]])
    return CarriedPositions(number, fields[:, 1:4].T, VideoPlace(*place))


def placed(
    positions: torch.Tensor,
    carried: Sequence[CarriedPositions],
    runs: Sequence[tuple[int, int]],
    num_computed_tokens: int,
) -> tuple[torch.Tensor, int]:
    """Return a prompt's positions with those that rows carry, (3, n), and vLLM's delta.

    The delta is how much further than its number in the sequence a generated token stands.

    Args:
        positions: (3, n) int64 in host memory, of a prompt with all before the rows in place.
        carried: of consecutive videos, in order; of the first perhaps its later rows alone, of the
            last perhaps its earlier ones.
        runs: where each run of video tokens begins and ends in the prompt, in order.
        num_computed_tokens: where what is computed now begins. (vLLM's V1 runner gathers rows for
            a draft model one place later and does not say so: a row is put where its number says.)
    """
    positions = positions.clone()
    begin, behind = num_computed_tokens, 0
    for rows in carried:
        place = rows.place
        starts = (first - place.first_pad for first, stop in runs if stop - first == place.num_pads)
        start = next((each for each in starts if each + rows.first_row >= begin), None)
        if start is None or rows.first_row + len(rows) > place.num_rows:
            # Two videos with no token between them: theirs stay evenly spaced.
            continue
        origin = int(positions[:, start - 1].max()) + 1 if start else 0
        begin = start + rows.first_row
        positions[:, begin : begin + len(rows)] = rows.positions + origin
        begin += len(rows)
        behind = max(behind, origin + place.end)
    return positions, max(behind, int(positions.max()) + 1) - positions.shape[1]


def runs_of(token: int, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Return where each run of a token begins and ends."""
    is_token = np.concatenate([[False], np.asarray(tokens) == token, [False]])
    edges = np.flatnonzero(is_token[1:] != is_token[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class UncompressedPrompt:
    """A prompt as it would be with all tokens of its videos."""

    tokens: list[int]
    features: list[MultiModalFeatureSpec]
    kept: torch.Tensor
    """(n,) int64: which of its tokens the compressed prompt has, ascending. Of a video those that
    are evenly spaced; which they are is known later."""


def uncompressed(
    tokens: Sequence[int],
    features: Sequence[MultiModalFeatureSpec],
    full_tokens: Mapping[int, Sequence[int]],
    pad: int,
) -> UncompressedPrompt:
    """Return a prompt with all tokens of its videos.

    Args:
        tokens: of the compressed prompt.
        features: what is not text in it, in any order.
        full_tokens: of each compressed video, by its index among the features.
        pad: the video token; what else there is of a video is text and all kept.
    """
    full: list[int] = []
    kept: list[torch.Tensor] = []
    moved = list(features)
    done = 0

    def take(stop: int) -> None:
        kept.append(torch.arange(len(full), len(full) + stop - done))
        full.extend(tokens[done:stop])

    for index in sorted(range(len(features)), key=lambda i: features[i].mm_position.offset):
        place = features[index].mm_position
        take(place.offset)
        done = place.offset
        if index in full_tokens:
            own = full_tokens[index]
            kept.append(len(full) + _evenly_kept(own, place.length, pad))
            moved_to = PlaceholderRange(len(full), len(own), _is_embed(own, pad))
            full.extend(own)
            done += place.length
        else:
            moved_to = replace(place, offset=len(full))
        moved[index] = replace(features[index], mm_position=moved_to)
    take(len(tokens))
    return UncompressedPrompt(full, moved, torch.cat(kept))


def _evenly_kept(tokens: Sequence[int], num_kept: int, pad: int) -> torch.Tensor:
    """Return the numbers of all text and of evenly spaced video tokens, ascending."""
    text, pads = text_and_pads(tokens, pad)
    even = evenly_spaced(num_kept - len(text), len(pads), torch.device("cpu"))
    return torch.cat([text, pads[even]]).sort().values


def text_and_pads(tokens: Sequence[int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the tokens that are not the video token, and of those that are."""
    is_pad = torch.tensor(tokens) == pad
    return (~is_pad).nonzero().flatten(), is_pad.nonzero().flatten()


def _is_embed(tokens: Sequence[int], pad: int) -> torch.Tensor | None:
    """Return which of an uncompressed video's tokens are no text, None for all, as vLLM does."""
    is_pad = torch.tensor(tokens) == pad
    return None if bool(is_pad.all()) else is_pad


def video_alone(
    fields: Mapping[str, Any], tokens: Sequence[int], pad: int
) -> MultiModalFeatureSpec:
    """Return a prompt's one feature: an uncompressed video at its beginning.

    Args:
        fields: what the model computes positions from, by its name among the video's data.
        tokens: the video's, those of text within it included.
        pad: the video token.
    """
    field = MultiModalFieldConfig.batched("video").field
    data = {name: MultiModalFieldElem(data=value, field=field) for name, value in fields.items()}
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem(data),
        modality="video",
        identifier="video",
        mm_position=PlaceholderRange(0, len(tokens), _is_embed(tokens, pad)),
    )
