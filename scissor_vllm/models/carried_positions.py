"""Mixin for models in which a compressed video's rows carry their own positions.

Positions have two parts: those of the prompt, known before encoding, and those that rows carry. See
``scissor_vllm.worker.positions``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec

from scissor_vllm.video_fields import NUM_RETAINED, NUM_VIDEO_TOKENS
from scissor_vllm.worker.positions import carried_positions, placed, runs_of, uncompressed


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
        full_tokens = {
            index: self._full_video_tokens(
                {name: feature.data[name].data for name in self.place_fields}
            )
            for index, feature in enumerate(mm_features)
            if is_compressed(feature)
        }
        if not full_tokens:
            return self._whole_positions(input_tokens, mm_features)
        full = uncompressed(input_tokens, mm_features, full_tokens, self.video_token)
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

        The model runner calls this before it computes the rows.
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
