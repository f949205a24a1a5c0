"""Gemma 4 with compressed videos: the changes of ``frame_runs`` for 1-D positions.

- A frame's number of tokens depends on the video's resolution.
- Models with per-layer embeddings look them up by token id, also for the text within a video. So
  rows carry the ids of that text behind their values.
- Models with bidirectional attention within a frame find each frame's run by its placeholders. A
  compressed video's placeholders have no such runs, so ratios below 1.0 are refused.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.model_executor.models import gemma4_mm as stock
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.frontend.processing_info import RetentionProcessingInfo
from scissor_vllm.models.frame_runs import (
    FramesOfVideo,
    SequentialFrameRunsModel,
    SequentialFrameRunsProcessor,
)
from scissor_vllm.worker.feature_cache import Sharing
from scissor_vllm.worker.pinned import to_device
from scissor_vllm.worker.video_compression import make_sharing

_PIXELS, _PLACES = "pixel_values_videos", "pixel_position_ids_videos"


class Gemma4ProcessingInfo(RetentionProcessingInfo, stock.Gemma4ProcessingInfo):
    """Counts a video's tokens."""

    def get_num_compressible_tokens(self, *, width: int, height: int, num_frames: int) -> int:
        """Return T*P of the frames as the image processor resizes them."""
        per_frame = self._compute_num_soft_tokens(
            width, height, max_soft_tokens=stock._VIDEO_MAX_SOFT_TOKENS
        )
        return num_frames * int(per_frame)

    def get_num_fixed_tokens(self) -> int:
        """Return 0: nothing follows a video."""
        return 0


class Gemma4Processor(SequentialFrameRunsProcessor, stock.Gemma4MultiModalProcessor):
    """Gives a video K placeholders and those of its text."""

    pixel_fields = (_PIXELS, _PLACES)

    def _video_pad(self) -> int:
        return int(self.info.get_hf_processor().video_token_id)

    def _get_num_prepared_tokens(self, processed: Any, index: int) -> int:
        return int(sum(processed["video_num_soft_tokens"][index]))

    def _why_not_compressed(self, options: Any) -> str | None:
        text = self.info.get_hf_config().get_text_config()
        if getattr(text, "use_bidirectional_attention", None) != "vision":
            return super()._why_not_compressed(options)
        return "this checkpoint attends both ways within a frame, which needs all of its tokens"


@MULTIMODAL_REGISTRY.register_processor(
    Gemma4Processor, info=Gemma4ProcessingInfo, dummy_inputs=stock.Gemma4DummyInputsBuilder
)
class Gemma4ForConditionalGeneration(
    SequentialFrameRunsModel, stock.Gemma4ForConditionalGeneration
):
    """Encodes a video to exactly K rows and its text."""

    @property
    def tokens_per_frame(self) -> int:
        """The largest P."""
        return int(stock._VIDEO_MAX_SOFT_TOKENS)

    def _videos(self, fields: dict[str, Any], num_tokens: list[int]) -> list[FramesOfVideo]:
        counts = fields["video_frame_counts"].flatten().tolist()
        videos = zip(fields[_PIXELS].split(counts), fields[_PLACES].split(counts), strict=True)
        return [
            FramesOfVideo(
                torch.arange(len(pixels), device=pixels.device),
                total // len(pixels),
                partial(self._encode, pixels, places),
            )
            for (pixels, places), total in zip(videos, num_tokens, strict=True)
        ]

    def _rows(
        self,
        video: FramesOfVideo,
        num_retained: int,
        text: torch.Tensor,
        identity: torch.Tensor | None,
    ) -> torch.Tensor:
        sharing = make_sharing()
        if sharing is not None and num_retained != len(video.pixels) * video.tokens_per_frame:
            # vLLM sizes a call of the tower by a worker's free memory. Workers with other sizes
            # round differently, and so could group a video's tokens differently.
            video = replace(video, encode=partial(_shared, sharing, video.encode))
        return super()._rows(video, num_retained, text, identity)

    def _encode(
        self, pixels: torch.Tensor, places: torch.Tensor, frames: torch.Tensor
    ) -> torch.Tensor:
        video = stock.Gemma4VideoInputs(
            pixel_values_videos=pixels[frames],
            pixel_position_ids_videos=places[frames],
            video_frame_counts=torch.tensor([len(frames)]),
        )
        (tokens,) = self._process_video_input(video)
        return tokens.view(len(frames), -1, tokens.shape[-1])

    def _among_text(
        self, rows: torch.Tensor, members: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        laid_out, numbers = super()._among_text(rows, members, text)
        if self.per_layer_embeddings is None:
            return laid_out, numbers
        ids, num_before = to_device(text, rows.device)
        places = num_before + torch.arange(len(ids), device=rows.device)
        of_row = torch.zeros(len(laid_out), dtype=torch.int32, device=rows.device)
        of_row[torch.searchsorted(numbers, places)] = ids.to(torch.int32)
        return torch.cat([laid_out, of_row[:, None].view(rows.dtype)], dim=1), numbers

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return vLLM's embeddings, and set the per-layer embeddings of text within videos."""
        width = self.row_width
        embeddings = list(multimodal_embeddings or ())
        values = [rows[:, :width] for rows in embeddings] if embeddings else multimodal_embeddings
        embedded: torch.Tensor = super().embed_input_ids(
            input_ids, values, is_multimodal=is_multimodal
        )
        if is_multimodal is None or all(rows.shape[1] == width for rows in embeddings):
            return embedded
        # Stock looks up token 0 for every placeholder.
        is_row = is_multimodal.to(input_ids.device, non_blocking=True)
        ids = torch.cat([_carried_ids(rows, width) for rows in embeddings]).to(input_ids.dtype)
        looked_up = torch.zeros_like(input_ids).masked_scatter(is_row, ids)
        looked_up = torch.where(is_row, looked_up, input_ids)
        per_layer = self.language_model.model.get_per_layer_inputs(looked_up)
        kept = self.per_layer_embeddings[: len(looked_up)]
        kept.copy_(per_layer.reshape(kept.shape))
        return embedded


def _shared(
    sharing: Sharing, encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor
) -> torch.Tensor:
    """Return the first worker's tokens in all workers that share a model."""
    return sharing.share(encode(pixels).contiguous())


def _carried_ids(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return the token id that each row carries behind ``width`` values, 0 without one."""
    if rows.shape[1] == width:
        return rows.new_zeros(len(rows), dtype=torch.int32)
    return rows[:, width:].contiguous().view(torch.int32).flatten()
