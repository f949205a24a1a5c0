"""Nemotron Nano VL 2 and the Nemotron Omni models with compressed videos.

Changes beyond those of ``frame_runs`` for 1-D positions:
- If the tower takes several frames together, the group counts as one frame: a run holds its tokens.
- vLLM's class returns the text within a video among the rows, also for an uncompressed video.
- Videos with their audio (``use_audio_in_video``) are not compressed.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.models import nano_nemotron_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.nano_nemotron_vl import (
    IMG_CONTEXT,
    get_video_target_size_and_feature_size,
)

from scissor_vllm.frontend.processing_info import RetentionProcessingInfo
from scissor_vllm.models.frame_runs import (
    FramesOfVideo,
    SequentialFrameRunsModel,
    SequentialFrameRunsProcessor,
)


class NanoNemotronVLProcessingInfo(RetentionProcessingInfo, stock.NanoNemotronVLProcessingInfo):
    """Counts a video's tokens."""

    def get_num_compressible_tokens(self, *, width: int, height: int, num_frames: int) -> int:
        """Return T*P, where T counts the groups of frames that the tower takes together."""
        processor = self.get_hf_processor()
        per_group = processor.num_image_token
        if processor.video_target_num_patches is not None:
            _, _, per_group = get_video_target_size_and_feature_size(
                orig_w=width,
                orig_h=height,
                target_patches=processor.video_target_num_patches,
                maintain_aspect_ratio=processor.video_maintain_aspect_ratio,
                patch_size=processor.config.patch_size,
                downsample_ratio=processor.config.downsample_ratio,
            )
        return math.ceil(num_frames / processor.video_temporal_patch_size) * int(per_group)

    def get_num_fixed_tokens(self) -> int:
        """Return 0: nothing follows a video."""
        return 0


class NanoNemotronVLProcessor(
    SequentialFrameRunsProcessor, stock.NanoNemotronVLMultiModalProcessor
):
    """Gives a video K placeholders and those of its text."""

    pixel_fields = ("pixel_values_flat_video",)

    def _video_pad(self) -> int:
        (pad,) = self.info.get_tokenizer().encode(IMG_CONTEXT, add_special_tokens=False)
        return int(pad)

    def _get_num_prepared_tokens(self, processed: Any, index: int) -> int:
        config = self.info.get_hf_config()
        pixels = processed["pixel_values_flat_video"]
        height, width = (pixels if isinstance(pixels, torch.Tensor) else pixels[index]).shape[-2:]
        rows, columns = (
            int(side * config.downsample_ratio // config.patch_size) for side in (height, width)
        )
        frames_at_once = self.info.get_hf_processor().video_temporal_patch_size
        num_frames = int(processed["video_num_patches"][index])
        return math.ceil(num_frames / frames_at_once) * rows * columns

    def _why_not_compressed(self, options: Mapping[str, object]) -> str | None:
        merged = self.info.ctx.get_mm_config().merge_mm_processor_kwargs(options)
        if merged.get("use_audio_in_video"):
            return "a video is not compressed with its audio, leave use_audio_in_video out"
        return super()._why_not_compressed(options)


@MULTIMODAL_REGISTRY.register_processor(
    NanoNemotronVLProcessor,
    info=NanoNemotronVLProcessingInfo,
    dummy_inputs=stock.NanoNemotronVLDummyInputsBuilder,
)
class NemotronH_Nano_VL_V2(SequentialFrameRunsModel, stock.NemotronH_Nano_VL_V2):  # noqa: N801
    """Encodes a video to exactly K rows and its text."""

    @property
    def tokens_per_frame(self) -> int:
        """P, an estimate."""
        return int(self.num_image_token)

    def _videos(self, fields: dict[str, Any], num_tokens: list[int]) -> list[FramesOfVideo]:
        pixels = fields["pixel_values_flat_video"]
        if isinstance(pixels, torch.Tensor) and pixels.ndim == 4:
            pixels = pixels.split(fields["video_num_patches"].flatten().tolist())
        groups = [self._in_groups(frames) for frames in pixels]
        return [
            FramesOfVideo(group, total // len(group), self._encode)
            for group, total in zip(groups, num_tokens, strict=True)
        ]

    def _in_groups(self, frames: torch.Tensor) -> torch.Tensor:
        """Return groups (T, frames of a group, C, H, W); the last frame fills up the last group."""
        size = self.video_temporal_patch_size
        missing = -len(frames) % size
        if missing:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        return frames.unflatten(0, (-1, size))

    def _encode(self, groups: torch.Tensor) -> torch.Tensor:
        frames = groups.flatten(0, 1)
        together = len(frames) if self.video_temporal_patch_size > 1 else None
        tokens: torch.Tensor = self.extract_feature(frames, num_frames=together)
        return tokens

    def _whole_rows(self, rows: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        laid_out, _ = self._among_text(rows, torch.arange(len(rows), device=rows.device), text)
        return laid_out

    def _embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        # LoRA's layer has no adapter mapping for tokens that are embedded here.
        embed = self.get_language_model().model.embed_tokens
        embedded: torch.Tensor = (
            embed.base_layer if isinstance(embed, BaseLayerWithLoRA) else embed
        )(tokens)
        return embedded
