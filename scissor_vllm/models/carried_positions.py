"""Mixin for models in which a compressed video's rows carry their own positions.

Positions have two parts: those of the prompt, known before encoding, and those that rows carry. See
``scissor_vllm.worker.positions``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec

from scissor_vllm.video_fields import NUM_RETAINED, NUM_VIDEO_TOKENS
from scissor_vllm.worker.pinned import to_device
from scissor_vllm.worker.positions import (
    WholeVideo,
    carried_positions,
    place_on_device,
    placed,
    runs_of,
    uncompressed,
    video_alone,
)

_MAX_LAYOUTS = 16
"""Shapes of videos whose layouts are kept. One of 150 000 tokens takes about 5 MB."""


@dataclass
class VideoLayout:
    """Tokens and positions of an uncompressed video, which depend on its shape and text alone."""

    video: WholeVideo
    positions: torch.Tensor
    """(3, n) int64 in host memory, counted from the video's beginning."""
    end: int
    """First position after the video."""
    _copy: torch.Tensor | None = None

    def positions_on(self, device: torch.device) -> torch.Tensor:
        """Return the positions on the model's device."""
        if self._copy is None:
            self._copy = to_device(self.positions, device)
        return self._copy


class CarriedPositionsModel:
    """Mixin of a model, placed before vLLM's class; model runners call its methods."""

    place_fields: ClassVar[tuple[str, ...]]
    """Fields of a video that determine its tokens in the uncompressed prompt and their positions.
    """

    # A family defines these.

    @property
    def row_width(self) -> int:
        """Number of values in a row."""
        raise NotImplementedError

    @property
    def video_token(self) -> int:
        """Token id of a video's placeholders."""
        raise NotImplementedError

    def _full_video_tokens(self, fields: Mapping[str, Any]) -> list[int]:
        """Return a video's token ids in the uncompressed prompt, with the text within the video."""
        raise NotImplementedError

    def _whole_positions(
        self, tokens: list[int], features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Return an uncompressed prompt's positions, (3, n) int64, and vLLM's delta."""
        raise NotImplementedError

    def _layout(self, fields: Mapping[str, Any]) -> VideoLayout:
        """Return the layout of a video with these ``place_fields``; the last few are kept."""
        known = [torch.as_tensor(fields[name]) for name in self.place_fields if name in fields]
        # NumPy has no bfloat16, in which vLLM sends floats.
        key = tuple((*values.shape, *values.flatten().tolist()) for values in known)
        layouts: dict[Any, VideoLayout] = self.__dict__.setdefault("_layouts", {})
        layout = layouts.pop(key, None)
        if layout is None:
            video = WholeVideo.of(self._full_video_tokens(fields), self.video_token)
            positions, _ = self._whole_positions(video.tokens, [video_alone(fields, video)])
            layout = VideoLayout(video, positions, int(positions.max()) + 1)
            if len(layouts) == _MAX_LAYOUTS:
                layouts.pop(next(iter(layouts)))
        layouts[key] = layout
        return layout

    def _video_runs(self, tokens: list[int]) -> list[tuple[int, int]]:
        """Return the begin and the end of each run of video tokens in a prompt."""
        return runs_of(self.video_token, tokens)

    # Model runners call these.

    supports_multimodal_pruning: ClassVar[Literal[True]] = True

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Return the prompt's positions (3, n) int64, and vLLM's delta.

        They are the uncompressed prompt's positions of the tokens that the prompt has. A compressed
        video's tokens are evenly spaced until its rows bring their positions.
        """
        videos = {
            index: self._layout({name: feature.data[name].data for name in self.place_fields}).video
            for index, feature in enumerate(mm_features)
            if is_compressed(feature)
        }
        if not videos:
            return self._whole_positions(input_tokens, mm_features)
        full = uncompressed(input_tokens, mm_features, videos)
        positions, _ = self._whole_positions(full.tokens, full.features)
        end = int(positions.max()) + 1
        return positions[:, full.kept], end - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Return the rows' values, the prompt's positions with the carried ones, and vLLM's delta.

        vLLM's V1 runner calls this before it computes the rows. It waits for the rows.
        """
        values = [rows[:, : self.row_width] for rows in multimodal_embeddings]
        carried = [
            of_rows
            for rows in multimodal_embeddings
            if (of_rows := carried_positions(rows, self.row_width)) is not None
        ]
        if not carried:
            return values, mrope_positions, delta_of(mrope_positions)
        tokens = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else input_ids
        runs = self._video_runs(tokens)
        positions, delta = placed(mrope_positions.cpu(), carried, runs, num_computed_tokens)
        return values, positions.to(mrope_positions.device), delta

    def place_carried(
        self,
        positions: torch.Tensor,
        features: Sequence[MultiModalFeatureSpec],
        rows: Sequence[torch.Tensor],
        num_computed_tokens: int,
        num_tokens: int,
    ) -> list[torch.Tensor]:
        """Write the positions that rows carry into a prompt's, and return the rows' values.

        For vLLM's V2 runner, without waiting for the rows. The delta stays: it was that of the
        uncompressed prompt from the beginning.

        Args:
            positions: (3, n) int32 of the prompt, in memory that the device can write. Modified.
            features: the prompt's, in order.
            rows: of the features with rows in this step, in order.
            num_computed_tokens: index of the first token of this step.
            num_tokens: of this step.
        """
        waiting = iter(rows)
        values = []
        behind_a_video = -1
        for feature in features:
            place = feature.mm_position
            first = max(num_computed_tokens - place.offset, 0)
            stop = min(num_computed_tokens + num_tokens - place.offset, place.length)
            is_behind_a_video = place.offset == behind_a_video
            behind_a_video = place.offset + place.length if feature.modality == "video" else -1
            if first >= stop:
                continue
            begin, end = place.get_embeds_indices_in_range(first, stop)
            if begin == end:
                continue
            of_video = next(waiting)
            # Of two videos without a token between them, the second keeps evenly spaced positions.
            if of_video.shape[1] > self.row_width and not is_behind_a_video:
                place_on_device(
                    positions, of_video, self.row_width, begin=place.offset, first_row=first
                )
            values.append(of_video[:, : self.row_width])
        return values


def delta_of(positions: torch.Tensor) -> int:
    """Return vLLM's delta of a prompt's positions (3, n).

    It is the position of a generated token less the token's index in the sequence.
    """
    return int(positions.max()) + 1 - positions.shape[1]


def is_compressed(feature: MultiModalFeatureSpec) -> bool:
    """Return whether the feature is a compressed video."""
    data = feature.data
    if data is None or NUM_RETAINED not in data or NUM_VIDEO_TOKENS not in data:
        return False
    return int(data[NUM_RETAINED].data) != int(data[NUM_VIDEO_TOKENS].data)
