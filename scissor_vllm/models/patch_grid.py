"""What the families share whose processor makes a video a grid of patches, as Qwen-VL's do.

Their frames have any size, a temporal patch holds two frames, tokens have M-RoPE positions. Changed
against vLLM's classes:
- a video of N tokens has K placeholders;
- videos of a batch with any ratio below 1.0 go through the vision tower one by one;
- a video's rows are in the order of their representative members and carry their positions, see
  ``scissor_vllm.positions``. With pipeline parallelism, where vLLM tells later ranks no positions
  that are known after encoding, they carry none and stand evenly spaced in the video;
- videos are encoded without CUDA graphs.

vLLM's own transport of pixels stays: it sends these families' patches as uint8 by itself
(``--mm-device-do-normalize``).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.multimodal.inputs import MultiModalFeatureSpec

from scissor_vllm.compression.members import representative_members
from scissor_vllm.pixels import VideoPixels
from scissor_vllm.positions import (
    carried_positions,
    placed,
    runs_of,
    uncompressed,
    video_alone,
    with_positions,
)
from scissor_vllm.processor import (
    NUM_RETAINED,
    NUM_VIDEO_TOKENS,
    RetentionProcessingInfo,
    RetentionProcessor,
)
from scissor_vllm.tower import VideoCompression
from scissor_vllm.vllm_compat import ask_model_for_positions

_WARM_UP_TOKENS_PER_FRAME = 256


class PatchGridProcessingInfo(RetentionProcessingInfo):
    """Mixin of a family's processing info: a video's tokens by its size."""

    def get_num_compressible_tokens(
        self,
        *,
        width: int,
        height: int,
        num_frames: int,
        mm_kwargs: Mapping[str, object] | None = None,
    ) -> int:
        """Return T*P of what the video processor resizes frames to."""
        # vLLM takes nothing but the size limits from what it calls the image processor.
        video_processor = self.get_hf_processor().video_processor  # type: ignore[attr-defined]
        return int(
            self.get_num_video_tokens(  # type: ignore[attr-defined]
                image_width=width,
                image_height=height,
                num_frames=num_frames,
                image_processor=video_processor,
                mm_kwargs=mm_kwargs or {},
            )
        )

    def get_num_fixed_tokens(self) -> int:
        """Return 0: every placeholder of a video is one of its tokens."""
        return 0


class PatchGridProcessor(RetentionProcessor):
    """Mixin of a family's processor."""

    def _count_tokens(
        self, width: int, height: int, num_frames: int, options: Mapping[str, object]
    ) -> int:
        return int(
            self.info.get_num_compressible_tokens(
                width=width, height=height, num_frames=num_frames, mm_kwargs=options
            )
        )

    def _get_num_prepared_tokens(self, processed: BatchFeature, index: int) -> int:
        merge_size = self.info.get_hf_config().vision_config.spatial_merge_size
        return int(processed["video_grid_thw"][index].prod()) // merge_size**2


class PatchGridModel:
    """Mixin of a family's model, placed before vLLM's class."""

    position_fields: ClassVar[tuple[str, ...]] = ("video_grid_thw",)
    """Fields of a video's data that vLLM's class computes its positions from."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        if model_config.get_multimodal_config().is_multimodal_pruning_enabled():
            raise ValueError(
                "--video-pruning-rate and scissor_vllm exclude each other: leave the first out and "
                "send a retention_ratio, or start vLLM with VLLM_PLUGINS= to prune"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.video_compression = VideoCompression(
            vllm_config, tokens_per_frame=_WARM_UP_TOKENS_PER_FRAME
        )
        self.row_width = model_config.get_inputs_embeds_size()
        self.carries_positions = vllm_config.parallel_config.pipeline_parallel_size == 1
        if self.carries_positions:
            ask_model_for_positions(model_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load as vLLM does, also while serving."""
        self.video_compression.forget_features()
        return super().load_weights(weights)  # type: ignore[misc]

    def get_encoder_cudagraph_config(self) -> Any:
        """Return vLLM's, for images alone: its graphs would go past our ``embed_multimodal``."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        modalities = [modality for modality in config.modalities if modality != "video"]
        return replace(config, modalities=modalities, max_frames_per_video=1)

    # Rows.

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Return (K, D) for each video, with the rows' positions behind their values; images, and
        the values of videos that are all kept whole, as vLLM does.
        """
        parameter = next(self.visual.parameters())  # type: ignore[attr-defined]
        self.video_compression.warm_up(self.row_width, parameter.dtype, parameter.device)
        num_retained = kwargs.pop(NUM_RETAINED, None)
        kwargs.pop(NUM_VIDEO_TOKENS, None)
        if not isinstance(num_retained, torch.Tensor):
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        counts = num_retained.flatten().tolist()
        videos = self._take_videos(kwargs)
        if self.video_compression.keeps_all(videos, counts):
            with self.video_compression.stage("tower", parameter.device):
                whole = super().embed_multimodal(**kwargs)  # type: ignore[misc]
            every = [torch.arange(count, device=parameter.device) for count in counts]
            encoded = list(zip(whole, every, strict=True))
        else:
            encoded = [
                self._encoded(video, count, grid)
                for video, count, grid in zip(videos, counts, kwargs["video_grid_thw"], strict=True)
            ]
        if not self.carries_positions:
            return tuple(rows for rows, _ in encoded)
        return tuple(
            self._with_positions(
                rows, members, {name: kwargs[name][index] for name in self.position_fields}
            )
            for index, (rows, members) in enumerate(encoded)
        )

    def _take_videos(self, fields: Mapping[str, Any]) -> list[VideoPixels]:
        """Return a batch's videos, each with a temporal patch's pixels in a frame's place."""
        grids = fields["video_grid_thw"].tolist()
        pixels = fields["pixel_values_videos"].split([t * h * w for t, h, w in grids])
        merged = self.config.vision_config.spatial_merge_size**2  # type: ignore[attr-defined]
        return [
            VideoPixels(patches.view(t, h * w, -1), tokens_per_frame=h * w // merged)
            for patches, (t, h, w) in zip(pixels, grids, strict=True)
        ]

    def _encoded(
        self, video: VideoPixels, num_retained: int, grid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (K, D) in the order of their representative members, and those, (K,)."""

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            # The tower attends within a temporal patch, so that a part is encoded as in the whole.
            part = grid.clone()
            part[0] = len(pixels)
            inputs = self._parse_and_validate_video_input(  # type: ignore[attr-defined]
                pixel_values_videos=pixels.flatten(0, 1), video_grid_thw=part[None]
            )
            (rows,) = self._process_video_input(inputs)  # type: ignore[attr-defined]
            return rows.view(len(pixels), -1, rows.shape[-1])

        tokens, compressed = self.video_compression.compressed(video, num_retained, encode)
        members, order = representative_members(tokens, compressed).sort(stable=True)
        return compressed.tokens[order], members

    # Positions.

    def _with_positions(
        self, rows: torch.Tensor, members: torch.Tensor, fields: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        num_tokens = int(fields["video_grid_thw"].prod())
        num_tokens //= self.config.vision_config.spatial_merge_size**2  # type: ignore[attr-defined]
        grid, _ = super().get_mrope_input_positions(  # type: ignore[misc]
            [0] * num_tokens, [video_alone(fields, num_tokens)]
        )
        end = int(grid.max()) + 1
        return with_positions(rows, grid.to(rows.device, non_blocking=True)[:, members], end)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Return vLLM's positions of the uncompressed prompt, less the tokens that are not there;
        what a video's own are is known after it was encoded.
        """
        num_tokens = {}
        for index, feature in enumerate(mm_features):
            count = feature.data.get(NUM_VIDEO_TOKENS) if feature.data is not None else None
            if count is not None and int(count.data) != feature.mm_position.length:
                num_tokens[index] = int(count.data)
        stock: Any = super().get_mrope_input_positions  # type: ignore[misc]
        if not num_tokens:
            return stock(input_tokens, mm_features)
        full = uncompressed(input_tokens, mm_features, num_tokens)
        positions, _ = stock(full.tokens, full.features)
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
        positions = mrope_positions.cpu()
        found = [each for each in carried if each is not None]
        if not found:
            delta = int(positions.max()) + 1 - positions.shape[1]
            return rows, mrope_positions, delta
        tokens = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else input_ids
        ranges = runs_of(self.config.video_token_id, tokens)  # type: ignore[attr-defined]
        positions, delta = placed(positions, found, ranges, num_computed_tokens)
        return rows, positions.to(mrope_positions.device), delta
