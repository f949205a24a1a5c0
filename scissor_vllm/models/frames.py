"""Mixins for families whose tower takes a video's frames one by one, all of one size.

A video is one run of N = T*P placeholders with 1-D positions. Changes to vLLM's classes:
- A video has K placeholders in place of N. What the model puts behind a video stays.
- Videos of a batch with any ratio below 1.0 pass the vision tower one by one.
- Checkpoints saved by transformers 5 load, although their vision tower has no ``vision_model``
  level.

Rows have consecutive positions, as in the paper.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import regex as re
import torch
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper

from scissor_vllm.frontend.processing_info import RetentionProcessingInfo
from scissor_vllm.frontend.processor import RetentionProcessor
from scissor_vllm.patch_merging import CALL_FRAMES
from scissor_vllm.settings import (
    TOWER_FP8_MAX_RATIO,
    TOWER_MERGING_MAX_RATIO,
    TowerFP8,
    TowerMerging,
)
from scissor_vllm.video_fields import (
    FRAME_OF,
    NUM_ENCODED_TOKENS,
    NUM_RETAINED,
    NUM_VIDEO_TOKENS,
    VIDEO_FRAMES,
)
from scissor_vllm.vllm_compat import forget_with_encoder_cache
from scissor_vllm.worker import fp8_mlp
from scissor_vllm.worker.encoder_graphs import USES_BEFORE_CAPTURE, EncoderGraphs
from scissor_vllm.worker.fp8_mlp import FP8MLP
from scissor_vllm.worker.tower_ranks import encode_on_all_ranks, num_tower_ranks
from scissor_vllm.worker.video_compression import VideoCompression, adapts_tower
from scissor_vllm.worker.video_pixels import (
    VideoPixels,
    batched_pixels,
    take_every_frame,
    take_video_pixels,
)

FUSED_FRAMES = 16
"""Least number of frames for the fused encoder. With fewer frames the host's launches are the
bottleneck, and the fused encoder takes longer to launch (``bench/tower.py``)."""

_TOWER_PARTS = "embeddings|encoder|post_layernorm|pre_layrnorm|head"

WITH_TOWER_LEVEL = WeightsMapper(
    orig_to_new_regex={
        re.compile(rf"^(model\.)?vision_tower\.(?={_TOWER_PARTS})"): r"\1vision_tower.vision_model."
    }
)
"""Adds the level that checkpoints on the hub have; it runs before a class's own mapper."""


class FramesProcessingInfo(RetentionProcessingInfo):
    """Mixin of a family's processing info: a video's tokens by its number of frames."""

    def get_num_compressible_tokens(self, *, width: int, height: int, num_frames: int) -> int:
        """Return T*P."""
        num_tokens = self.get_num_video_tokens(  # type: ignore[attr-defined]
            image_width=width, image_height=height, num_frames=num_frames
        )
        return int(num_tokens) - self.get_num_fixed_tokens()

    def get_num_fixed_tokens(self) -> int:
        """Return 0: nothing follows a video."""
        return 0

    def get_num_frames_of_image(self) -> int:
        """Return 1: a frame's tokens are its own."""
        return 1

    def get_patch_size(self) -> int | None:
        """Return the side of a patch in pixels, None unless the tower is SigLIP's."""
        vision = self.get_hf_config().vision_config  # type: ignore[attr-defined]
        return int(vision.patch_size) if vision.model_type == "siglip_vision_model" else None

    def has_fp8_tower(self) -> bool:
        """Return whether the tower is SigLIP's."""
        return self.get_patch_size() is not None


class FramesProcessor(RetentionProcessor):
    """Mixin of a family's processor."""

    def _get_num_prepared_tokens(self, processed: BatchFeature, index: int) -> int:
        if VIDEO_FRAMES in processed:
            num_frames, height, width, _ = processed[VIDEO_FRAMES][index].shape
            if FRAME_OF in processed:
                num_frames = len(processed[FRAME_OF][index])
        else:
            num_frames, _, height, width = processed["pixel_values_videos"][index].shape
        side = self.info.get_hf_config().vision_config.image_size
        if (height, width) != (side, side):
            raise VLLMValidationError(
                f"the vision tower takes frames of {side}x{side}, but video {index} was resized to "
                f"{width}x{height}: leave size and crop_size out of mm_processor_kwargs",
                parameter="mm_processor_kwargs",
            )
        return int(
            self.info.get_num_compressible_tokens(width=width, height=height, num_frames=num_frames)
        )


class FramesModel:
    """Mixin of a family's model, placed before vLLM's class."""

    supports_encoder_tp_data: ClassVar[bool] = True
    """vLLM's towers of these families can be whole on each rank, though its classes do not say so.
    """

    config: Any
    multi_modal_projector: Any
    vision_tower: Any
    _has_fp8 = False
    _mlps: Sequence[FP8MLP] = ()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        forget_with_encoder_cache()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.video_dtype = model_config.dtype
        self._num_tower_ranks = num_tower_ranks()
        self._graphs: EncoderGraphs | None = None
        self._is_eager = model_config.enforce_eager
        self.video_compression = VideoCompression(vllm_config, self.tokens_per_frame)
        mm_config = model_config.get_multimodal_config()
        settings, has_tower = mm_config.mm_processor_kwargs, True
        if isinstance(self.vision_tower, StageMissingLayer):
            has_tower = False
        merging = TowerMerging.from_mm_processor_kwargs(settings)
        self._merges_patches = has_tower and merging.max_ratio > 0
        in_fp8 = TowerFP8.from_mm_processor_kwargs(settings)
        self._has_fp8 = has_tower and in_fp8.max_ratio > 0
        if self._has_fp8:
            self._check_fp8(vllm_config)
        if self._merges_patches:
            from scissor_vllm.worker.merged_encoder import merges_patches

            if not merges_patches(self.vision_tower):
                raise ValueError(
                    f"{TOWER_MERGING_MAX_RATIO} needs the layers of vLLM's SigLIP tower, got "
                    f"{type(self.vision_tower).__name__}: leave it out"
                )

    def _check_fp8(self, vllm_config: VllmConfig) -> None:
        """Raise ValueError unless the tower's MLPs can be computed in FP8."""
        from scissor_vllm.worker.siglip_layers import plain_layers

        reason = fp8_mlp.why_not(plain_layers(self.vision_tower))
        if adapts_tower(vllm_config):
            reason = "requests may name an adapter of the tower"
        if reason is not None:
            raise ValueError(f"{TOWER_FP8_MAX_RATIO} cannot be set here: {reason}, or leave it out")

    @property
    def tokens_per_frame(self) -> int:
        """P."""
        raise NotImplementedError

    def forget_encoded(self) -> None:
        """Drop cached features of old weights, see ``forget_with_encoder_cache``."""
        self.video_compression.forget_features()
        fp8_mlp.refresh(self._mlps)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights as vLLM does, and drop cached features; also called while serving."""
        self.video_compression.forget_features()
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        # On a CPU vLLM takes the weights away once they are loaded.
        self._refresh_mlps()
        return loaded

    def _refresh_mlps(self) -> None:
        """Have MLPs in FP8 of today's weights, if the operator wants them."""
        if not self._has_fp8:
            return
        if self._mlps:
            fp8_mlp.refresh(self._mlps)
        else:
            self._mlps = fp8_mlp.make_mlps(self.vision_tower.vision_model.encoder.layers)

    # A family may override these.

    def _rows_behind(self) -> torch.Tensor:
        """Return the rows that follow a video's tokens, (n, D)."""
        weight = self.multi_modal_projector.linear_2.weight
        return weight.new_empty(0, len(weight))

    def _is_for_vllm(self, videos: list[VideoPixels]) -> bool:
        """Return whether vLLM's class can encode these uncompressed videos."""
        return True

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the tokens of ``_encode_as_vllm``, equal up to rounding."""
        return self._encode_as_vllm(pixels)

    # Rows.

    def _encode_as_vllm(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the tokens (t, P, D) of frames (t, C, H, W), bit for bit those of vLLM's class."""
        tokens: torch.Tensor = self._video_pixels_to_features(self.vision_tower, pixels)  # type: ignore[attr-defined]
        return tokens

    def _encode(
        self, pixels: torch.Tensor, anchors: torch.Tensor | None = None, *, in_fp8: bool
    ) -> torch.Tensor:
        """Return the same tokens up to rounding, faster on a GPU.

        Args:
            pixels: (t, C, H, W).
            anchors: int64 (t, P), for each patch the frame whose patch replaces it, counted from
                the first frame here; None if the tower computes all patches.
            in_fp8: whether MLPs round to FP8.
        """
        encode = partial(self._encode_here, mlps=self._mlps if in_fp8 and self._mlps else None)
        if self._num_tower_ranks == 1:
            return encode(pixels, anchors)
        return encode_on_all_ranks(encode, pixels, anchors, self._num_tower_ranks)

    def _encode_here(
        self,
        pixels: torch.Tensor,
        anchors: torch.Tensor | None = None,
        *,
        mlps: Sequence[FP8MLP] | None = None,
    ) -> torch.Tensor:
        """Return the tokens of ``_encode``, all encoded by this rank."""
        if anchors is not None:
            from scissor_vllm.worker.merged_encoder import merging_encoder

            with merging_encoder(self.vision_tower, anchors, self._graphs, mlps):
                return self._features(pixels)
        if not pixels.is_cuda:
            if mlps is None:
                return self._features(pixels)
            from scissor_vllm.worker.siglip_layers import encoding_with

            with encoding_with(self.vision_tower, mlps):
                return self._features(pixels)
        if mlps is None and len(pixels) < FUSED_FRAMES:
            return self._features(pixels)
        from scissor_vllm.worker.siglip import fused_encoder

        graphs = self._graphs if len(pixels) <= CALL_FRAMES else None
        with fused_encoder(self.vision_tower, graphs, mlps):
            return self._features(pixels)

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Return K rows of each video and the rows that follow it.

        Images, and batches of uncompressed videos, are encoded as by vLLM's class.
        """
        behind = self._rows_behind()
        if self.video_compression.warm_up(behind.shape[1], behind.dtype, behind.device):
            self._warm_up_tower(behind)
        stock = super().embed_multimodal  # type: ignore[misc]
        num_retained = kwargs.pop(NUM_RETAINED, None)
        kwargs.pop(NUM_VIDEO_TOKENS, None)
        kwargs.pop(NUM_ENCODED_TOKENS, None)
        if not isinstance(num_retained, torch.Tensor):
            rows: MultiModalEmbeddings = stock(**kwargs)
            return rows
        counts = num_retained.flatten().tolist()
        videos = take_video_pixels(kwargs, self.video_dtype)
        if not videos:
            keeps_every_frame = take_every_frame(kwargs, len(counts))
            inputs = self._parse_and_validate_video_input(**kwargs)  # type: ignore[attr-defined]
            assert inputs is not None
            videos = [
                VideoPixels(pixels, keeps_every_frame=every)
                for pixels, every in zip(
                    inputs["pixel_values_videos"], keeps_every_frame, strict=True
                )
            ]
        if self._is_for_vllm(videos) and self.video_compression.keeps_all(videos, counts):
            with self.video_compression.stage("tower", behind.device):
                whole: MultiModalEmbeddings = stock(pixel_values_videos=batched_pixels(videos))
                return whole
        with self.video_compression.overlapping(len(videos), behind.device):
            return tuple(
                self._rows(video, count, behind)
                for video, count in zip(videos, counts, strict=True)
            )

    def _warm_up_tower(self, like: torch.Tensor) -> None:
        """Encode empty frames, so that no request waits for the compilation of kernels.

        Where patches are merged on a GPU, it captures the graph that takes the most memory, so that
        vLLM counts that memory.
        """
        self._refresh_mlps()
        vision = self.config.vision_config
        pixels = like.new_zeros(CALL_FRAMES, 3, vision.image_size, vision.image_size)
        self._encode_here(pixels[:FUSED_FRAMES])
        if self._mlps:
            self._encode_here(pixels[:FUSED_FRAMES], mlps=self._mlps)
        if not self._merges_patches:
            return
        num_frames, num_uses = FUSED_FRAMES, 1
        if like.is_cuda and not self._is_eager:
            from scissor_vllm.worker.siglip import graphs_of

            self._graphs = graphs_of(self.vision_tower)
            num_frames, num_uses = CALL_FRAMES, USES_BEFORE_CAPTURE + 1
        num_patches = (vision.image_size // vision.patch_size) ** 2
        frames = torch.arange(num_frames)[:, None]
        # One frame's patches are merged, so nearly all are computed.
        anchors = (frames - (frames == 1).long()).expand(-1, num_patches)
        for _ in range(num_uses):
            self._encode_here(pixels[:num_frames], anchors, mlps=self._mlps or None)

    def _rows(self, video: VideoPixels, num_retained: int, behind: torch.Tensor) -> torch.Tensor:
        """Return a video's rows and the rows that follow it."""
        is_whole = self.video_compression.keeps_all([video], [num_retained])
        encode = self._encode_as_vllm if is_whole else partial(self._encode, in_fp8=video.in_fp8)
        _, compressed = self.video_compression.compressed(video, num_retained, encode)
        return torch.cat([compressed.tokens, behind])
