"""What models share whose compressed videos' rows carry their own positions.

See ``scissor_vllm.worker.positions`` for the two parts: a prompt's positions before anything is
encoded, and those that come with the rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec

from scissor_vllm.video_fields import NUM_RETAINED, NUM_VIDEO_TOKENS
from scissor_vllm.worker.positions import carried_positions, placed, runs_of, uncompressed


class CarriedPositionsModel:
    """Mixin of a model, placed before vLLM's class; its methods are what model runners call."""

    place_fields: ClassVar[tuple[str, ...]]
    """Fields of a video's data that its tokens in the uncompressed prompt, and the positions of
    them, follow from."""

    # What a family has of its own.

    @property
    def row_width(self) -> int:
        """Values of a row."""
        raise NotImplementedError

    @property
    def video_token(self) -> int:
        """The token that a video's placeholders are."""
        raise NotImplementedError

    def _full_video_tokens(self, fields: Mapping[str, Any]) -> list[int]:
        """Return a video's tokens in the uncompressed prompt, those of text within it included."""
        raise NotImplementedError

    def _whole_positions(
        self, tokens: list[int], features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Return an uncompressed prompt's positions, (3, n) int64, and vLLM's delta."""
        raise NotImplementedError

    def _video_runs(self, tokens: list[int]) -> list[tuple[int, int]]:
        """Return where each run of video tokens begins and ends in a prompt."""
        return runs_of(self.video_token, tokens)

    # What model runners call.

    supports_multimodal_pruning: ClassVar[Literal[True]] = True

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Return the positions of the uncompressed prompt, less the tokens that are not there;
        what a video's own are is known after it was encoded.
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
        """Return the rows' values, the prompt's positions with those that the rows carry, and
        vLLM's delta; called by the model runner before rows are computed.
        """
        rows = [each[:, : self.row_width] for each in multimodal_embeddings]
        carried = [carried_positions(each, self.row_width) for each in multimodal_embeddings]
        found = [each for each in carried if each is not None]
        if not found:
            return rows, mrope_positions, delta_of(mrope_positions)
        tokens = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else input_ids
        runs = self._video_runs(tokens)
        positions, delta = placed(mrope_positions.cpu(), found, runs, num_computed_tokens)
        return rows, positions.to(mrope_positions.device), delta


def delta_of(positions: torch.Tensor) -> int:
    """Return vLLM's delta of a prompt's positions (3, n): how much further than its number in the
    sequence a generated token stands.
    """
    return int(positions.max()) + 1 - positions.shape[1]


def is_compressed(feature: MultiModalFeatureSpec) -> bool:
    """Return whether it is a video of which not all tokens are kept."""
    data = feature.data
    if data is None or NUM_RETAINED not in data or NUM_VIDEO_TOKENS not in data:
        return False
    return int(data[NUM_RETAINED].data) != int(data[NUM_VIDEO_TOKENS].data)
