"""Positions of a compressed video's tokens in the uncompressed prompt, for models with M-RoPE.

A merged token has the position (t, h, w) of its representative among the video's tokens, which is
known only after encoding. All other tokens have their positions in the uncompressed prompt: the
text after a video continues after the whole video. So positions have two parts:

- Before encoding, a prompt's positions are those of the uncompressed prompt, without the tokens
  that are missing (:func:`uncompressed`). They do not depend on a video's content. So a prefix
  cache hit may end anywhere, even in a video that this worker never encoded.
- A video's rows carry their positions behind their values (:func:`with_positions`). They come from
  the encoder cache whenever a row is computed, and are then written into the prompt's positions:
  by :func:`place_on_device` where these are in memory of the device, else by :func:`placed`, which
  waits for the device.

Rows are cached in the model's dtype. bfloat16 holds not every integer above 256, so the positions
travel as the bits of int32.
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
    """Layout of a video's placeholders in a prompt, and the position of the text after it."""

    num_rows: int
    """Number of the video's placeholders, with those of text within it."""
    first_pad: int
    """Index of the first video token among them."""
    num_pads: int
    """Length of the run of video tokens from there."""
    end: int
    """First position after the video, counted from the video's beginning."""


@dataclass(frozen=True)
class CarriedPositions:
    """Positions that consecutive rows of one video carry, in host memory."""

    first_row: int
    """Index of the first of these rows in the video."""
    positions: torch.Tensor
    """(3, n) int64, counted from the video's beginning."""
    place: VideoPlace
    """Layout of the whole video."""

    def __len__(self) -> int:
        return self.positions.shape[1]


def with_positions(rows: torch.Tensor, positions: torch.Tensor, place: VideoPlace) -> torch.Tensor:
    """Return a video's rows with their positions behind their values, (K, D + fields).

    Args:
        rows: (K, D) floating.
        positions: (3, K) integer on the same device, counted from the video's beginning.
        place: layout of the video.
    """
    index = torch.arange(len(rows), device=rows.device)
    layout = [torch.full_like(index, value) for value in astuple(place)]
    fields = torch.stack([index, *positions, *layout], dim=1)
    return torch.cat([rows, fields.to(torch.int32).view(rows.dtype)], dim=1)


def carried_positions(rows: torch.Tensor, width: int) -> CarriedPositions | None:
    """Return the positions behind ``width`` values of each row, None if rows carry none.

    It synchronizes with the device.
    """
    if rows.shape[1] == width or len(rows) == 0:
        return None
    fields = rows[:, width:].cpu().contiguous().view(torch.int32).long()
    first_row, *place = (int(value) for value in fields[0, [0, 4, 5, 6, 7]])
    return CarriedPositions(first_row, fields[:, 1:4].T, VideoPlace(*place))


def place_on_device(
    positions: torch.Tensor, rows: torch.Tensor, width: int, *, begin: int, first_row: int
) -> None:
    """Write the positions that rows carry into those of their prompt, without waiting for them.

    Args:
        positions: (3, n) int32 in memory that the rows' device can write, final for the token
            before the video. Modified.
        rows: (k, D + fields) consecutive rows of a video, from :func:`with_positions`.
        width: D.
        begin: index of the video's first placeholder in the prompt.
        first_row: index of the first of the rows in the video.
    """
    carried = rows[:, width:].contiguous().view(torch.int32)[:, 1:4].T
    origin = positions[:, begin - 1].max() + 1 if begin else 0
    first = begin + first_row
    positions[:, first : first + len(rows)] = carried + origin


def placed(
    positions: torch.Tensor,
    carried: Sequence[CarriedPositions],
    runs: Sequence[tuple[int, int]],
    num_computed_tokens: int,
) -> tuple[torch.Tensor, int]:
    """Return a prompt's positions with the carried ones, (3, n), and vLLM's delta.

    The delta is the position of a generated token less the token's index in the sequence.

    Args:
        positions: (3, n) int64 in host memory, final for all tokens before the rows.
        carried: of consecutive videos, in order. The first video may lack its first rows, the last
            one its last rows.
        runs: begin and end of each run of video tokens in the prompt, in order.
        num_computed_tokens: index of the first token of this step. vLLM's V1 runner gathers rows
            for a draft model one place later without telling, so a row's place follows from its
            index in the video.
    """
    positions = positions.clone()
    begin, end = num_computed_tokens, 0
    for rows in carried:
        place = rows.place
        starts = (first - place.first_pad for first, stop in runs if stop - first == place.num_pads)
        start = next((start for start in starts if start + rows.first_row >= begin), None)
        if start is None or rows.first_row + len(rows) > place.num_rows:
            # Two videos without a token between them keep evenly spaced positions.
            continue
        origin = int(positions[:, start - 1].max()) + 1 if start else 0
        begin = start + rows.first_row
        positions[:, begin : begin + len(rows)] = rows.positions + origin
        begin += len(rows)
        end = max(end, origin + place.end)
    return positions, max(end, int(positions.max()) + 1) - positions.shape[1]


def runs_of(token: int, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Return the begin and the end of each run of a token."""
    is_token = np.concatenate([[False], np.asarray(tokens) == token, [False]])
    edges = np.flatnonzero(is_token[1:] != is_token[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class WholeVideo:
    """Tokens of an uncompressed video, with the text within it."""

    tokens: list[int]
    text: torch.Tensor
    """Indices of the tokens that are text, int64 ascending."""
    pads: torch.Tensor
    """Indices of all others, int64 ascending."""
    is_embed: torch.Tensor | None
    """vLLM's mask of the tokens that are no text, bool, None for all."""

    @classmethod
    def of(cls, tokens: list[int], pad: int) -> "WholeVideo":
        """Return the video with these tokens, of which ``pad`` is the video token."""
        text, pads = text_and_pads(tokens, pad)
        return cls(tokens, text, pads, torch.tensor(tokens) == pad if len(text) else None)

    def evenly_kept(self, num_kept: int) -> torch.Tensor:
        """Return the indices of all text and of evenly spaced video tokens, ascending."""
        even = evenly_spaced(num_kept - len(self.text), len(self.pads), torch.device("cpu"))
        return torch.cat([self.text, self.pads[even]]).sort().values


@dataclass(frozen=True)
class UncompressedPrompt:
    """A prompt with all tokens of its videos."""

    tokens: list[int]
    features: list[MultiModalFeatureSpec]
    kept: torch.Tensor
    """(n,) int64 ascending: indices of the tokens that the compressed prompt has. A video's tokens
    are evenly spaced; the true ones are known after encoding."""


def uncompressed(
    tokens: Sequence[int],
    features: Sequence[MultiModalFeatureSpec],
    videos: Mapping[int, WholeVideo],
) -> UncompressedPrompt:
    """Return a prompt with all tokens of its videos.

    Args:
        tokens: token ids of the compressed prompt.
        features: its multimodal features, in any order.
        videos: the compressed videos, by the feature's index.
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
        if index in videos:
            video = videos[index]
            kept.append(len(full) + video.evenly_kept(place.length))
            moved_to = PlaceholderRange(len(full), len(video.tokens), video.is_embed)
            full.extend(video.tokens)
            done += place.length
        else:
            moved_to = replace(place, offset=len(full))
        moved[index] = replace(features[index], mm_position=moved_to)
    take(len(tokens))
    return UncompressedPrompt(full, moved, torch.cat(kept))


def text_and_pads(tokens: Sequence[int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the tokens that are text, and of those that are the video token."""
    is_pad = torch.tensor(tokens) == pad
    return (~is_pad).nonzero().flatten(), is_pad.nonzero().flatten()


def video_alone(fields: Mapping[str, Any], video: WholeVideo) -> MultiModalFeatureSpec:
    """Return the feature of a prompt that is one uncompressed video.

    Args:
        fields: the model's ``place_fields`` of the video.
        video: its tokens.
    """
    field = MultiModalFieldConfig.batched("video").field
    data = {name: MultiModalFieldElem(data=value, field=field) for name, value in fields.items()}
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem(data),
        modality="video",
        identifier="video",
        mm_position=PlaceholderRange(0, len(video.tokens), video.is_embed),
    )
