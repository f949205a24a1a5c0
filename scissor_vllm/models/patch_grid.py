"""Mixins for families whose processor makes a video a grid of patches, as Qwen-VL's does.

Frames have any size, a temporal patch holds two frames, tokens have M-RoPE positions. Changes to
vLLM's classes:
- A video of N tokens has K placeholders.
- Videos of a batch with any ratio below 1.0 pass the vision tower one by one.
- A video's rows are ordered by their representative members and carry their positions, see
  ``scissor_vllm.worker.positions``. With pipeline parallelism vLLM sends later ranks no positions
  that are known only after encoding. Rows then carry none and are evenly spaced in the video.
- Videos are encoded without CUDA graphs.
- Compressed videos pass vLLM's fused norms also in a server that compiles, see ``fused_norms``.
- Qwen-VL's towers can merge patches, see ``worker.merged_grid``. On a GPU it encodes compressed
  videos of which nothing is merged, too: its attention places and rotates keys in one kernel.
- A video's frames travel as they are, and the device makes the patches, see ``worker.patches``.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems
from vllm.platforms import current_platform

from scissor_vllm.compression.members import member_means, representative_members
from scissor_vllm.frontend.computed_places import places_of_videos
from scissor_vllm.frontend.frame_transport import identity_of
from scissor_vllm.frontend.patch_anchors import anchors_of_videos
from scissor_vllm.frontend.patch_transport import sending_frames, sends_frames
from scissor_vllm.frontend.processing_info import RetentionProcessingInfo
from scissor_vllm.models.carried_positions import CarriedPositionsModel
from scissor_vllm.models.frame_runs import FrameRunsModel, FrameRunsProcessor, with_text
from scissor_vllm.patch_merging import computed_patches, shared_lengths
from scissor_vllm.settings import TOWER_MERGING_MAX_RATIO, TowerMerging
from scissor_vllm.video_fields import (
    FRAME_SIZE,
    NUM_ENCODED_TOKENS,
    NUM_RETAINED,
    NUM_VIDEO_TOKENS,
    PATCH_ANCHORS,
    PIXEL_NORMALIZATION,
    VIDEO_IDENTITY,
    VIDEO_PLACES,
    VIDEO_TEXT,
)
from scissor_vllm.vllm_compat import (
    ask_model_for_positions,
    forget_with_encoder_cache,
    fused_norms,
)
from scissor_vllm.worker.computed_places import ComputedPlaces
from scissor_vllm.worker.patches import PatchShape
from scissor_vllm.worker.pinned import to_device
from scissor_vllm.worker.positions import VideoPlace, with_positions
from scissor_vllm.worker.tower_ranks import encode_on_all_ranks, num_tower_ranks
from scissor_vllm.worker.video_compression import VideoCompression, adapts_tower
from scissor_vllm.worker.video_pixels import VideoPixels, take_every_frame

_GRID, _PIXELS = "video_grid_thw", "pixel_values_videos"
_NUM_CHANNELS = 3
_WARM_UP_TOKENS_PER_FRAME = 256


class PatchGridProcessingInfo(RetentionProcessingInfo):
    """Mixin of a family's processing info: a video's tokens by its size."""

    compresses_images: ClassVar[bool] = False
    """Whether runs of images are compressed as the frames of a video."""

    merges_patches: ClassVar[bool] = False
    """Whether ``worker.merged_grid`` supports the tower."""

    def get_patch_size(self) -> int | None:
        """Return the side of a patch in pixels, None if the tower merges no patches."""
        if not self.merges_patches:
            return None
        return int(self.get_hf_config().vision_config.patch_size)  # type: ignore[attr-defined]

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Return vLLM's processor, changed to return a video's frames in place of its patches."""
        hf_processor = super().get_hf_processor(**kwargs)  # type: ignore[misc]
        mm_config = self.ctx.get_mm_config()  # type: ignore[attr-defined]
        return sending_frames(hf_processor, bool(mm_config.mm_device_do_normalize))

    def get_num_compressible_tokens(
        self,
        *,
        width: int,
        height: int,
        num_frames: int,
        mm_kwargs: Mapping[str, object] | None = None,
    ) -> int:
        """Return T*P of the frames as the video processor resizes them."""
        # vLLM reads only the size limits of ``image_processor``.
        video_processor = self.get_hf_processor().video_processor
        return int(
            self.get_num_video_tokens(  # type: ignore[attr-defined]
                image_width=width,
                image_height=height,
                num_frames=num_frames,
                image_processor=video_processor,
                mm_kwargs=mm_kwargs or {},
            )
        )

    def get_num_frames_of_image(self) -> int:
        """Return the frames of a temporal patch if runs of images are compressed, else 0.

        Vision towers see an image as such a patch of equal frames. Two images in a patch would
        share their tokens.
        """
        if not self.compresses_images:
            return 0
        return int(self.get_hf_config().vision_config.temporal_patch_size)  # type: ignore[attr-defined]

    def get_num_fixed_tokens(self) -> int:
        """Return 0: every placeholder of a video is one of its tokens."""
        return 0


class PatchGridProcessor(FrameRunsProcessor):
    """Mixin of a family's processor."""

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        if NUM_RETAINED not in hf_inputs:
            return fields
        kept = {
            name: replace(config, field=replace(config.field, keep_on_cpu=True))
            for name, config in fields.items()
            if name == _PIXELS
        }
        return {
            **fields,
            **kept,
            FRAME_SIZE: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        }

    def _prepare(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object], ratio: float
    ) -> BatchFeature:
        processed = super()._prepare(mm_items, hf_kwargs, ratio)
        hf_processor = self.info.get_hf_processor(**hf_kwargs)
        merges = self.info.tower_merging.applies_to(ratio)
        if _PIXELS not in processed or not sends_frames(hf_processor):
            return processed
        grids, pixels = processed[_GRID], processed[_PIXELS]
        processed[FRAME_SIZE] = grids[:, 1:] * self.info.get_hf_config().vision_config.patch_size
        if pixels.dtype != torch.uint8:
            return processed
        normalization = hf_processor.video_processor.pixel_normalization
        hashed = {} if normalization is None else {"normalization": normalization}
        if hashed:
            processed[PIXEL_NORMALIZATION] = normalization.repeat(len(grids), 1, 1)
        videos = pixels.split(grids.prod(1).tolist())
        anchors = self._anchors(processed) if merges else []
        if anchors:
            processed[PATCH_ANCHORS] = anchors
        if ratio != 1.0 and self.info.cache_sizes.features > 0:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            processed[VIDEO_IDENTITY] = [
                identity_of(
                    algorithm,
                    grid=grid,
                    frames=rows,
                    **hashed,
                    **({"anchors": anchors[number]} if anchors else {}),
                )
                for number, (grid, rows) in enumerate(zip(grids, videos, strict=True))
            ]
        return processed

    def _frames(self, processed: BatchFeature) -> list[torch.Tensor]:
        """Return the uint8 frames (T, H, W, C) of each video, which stand for patches."""
        videos = processed[_PIXELS].split(processed[_GRID].prod(1).tolist())
        return [
            pixels.view(-1, height, width, _NUM_CHANNELS)
            for pixels, (height, width) in zip(videos, processed[FRAME_SIZE].tolist(), strict=True)
        ]

    def _leave_out_merged(self, processed: BatchFeature) -> None:
        vision = self.info.get_hf_config().vision_config
        side = vision.patch_size * vision.spatial_merge_size
        processed[VIDEO_PLACES] = places_of_videos(
            self._frames(processed), processed[PATCH_ANCHORS], side, vision.temporal_patch_size
        )
        del processed[_PIXELS]

    def _anchors(self, processed: BatchFeature) -> list[torch.Tensor]:
        """Return ``PATCH_ANCHORS`` of each video, [] if nothing is merged."""
        vision = self.info.get_hf_config().vision_config
        return anchors_of_videos(
            self._frames(processed),
            self.info.get_patch_size(),
            self.info.tower_merging.threshold,
            num_merged=vision.spatial_merge_size,
            num_frames=vision.temporal_patch_size,
        )

    def _count_patches(self, item: Mapping[str, Any]) -> tuple[int, int] | None:
        if _GRID not in item or FRAME_SIZE not in item:
            return None
        merged = self.info.get_hf_config().vision_config.spatial_merge_size
        num_frames, rows, columns = item[_GRID].data.tolist()
        num_patches = num_frames * rows * columns
        if PATCH_ANCHORS not in item:
            return num_patches, num_patches
        computed = computed_patches(item[PATCH_ANCHORS].data, (rows // merged, columns // merged))
        return num_patches, int(computed.sum()) * merged**2

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
        return int(processed[_GRID][index].prod()) // merge_size**2


class PatchGridModel(CarriedPositionsModel, FrameRunsModel):
    """Mixin of a family's model, placed before vLLM's class."""

    place_fields: ClassVar[tuple[str, ...]] = (_GRID, VIDEO_TEXT)

    config: Any
    visual: Any
    _merging_tower: Any = None
    _compiles_tower = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        self._check_options(vllm_config)
        # Before the layers are made: some size their table of rotations by the answer. Positions
        # continue after the whole video, however few tokens are kept.
        ask_model_for_positions(model_config)
        forget_with_encoder_cache()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        # vLLM's own pruning stays off.
        self.is_multimodal_pruning_enabled = False
        self.video_compression = VideoCompression(
            vllm_config, tokens_per_frame=_WARM_UP_TOKENS_PER_FRAME
        )
        self.pixel_dtype = model_config.dtype
        self._is_eager = model_config.enforce_eager
        self._compiles_tower = bool(vllm_config.compilation_config.compile_mm_encoder)
        self._num_tower_ranks = num_tower_ranks()
        is_pipelined = vllm_config.parallel_config.pipeline_parallel_size > 1
        self.carries_positions = model_config.uses_mrope and not is_pipelined
        mm_config = model_config.get_multimodal_config()
        merging = TowerMerging.from_mm_processor_kwargs(mm_config.mm_processor_kwargs)
        self._merges_patches = merging.max_ratio > 0 and not isinstance(
            self.visual, StageMissingLayer
        )
        is_plain = vllm_config.quant_config is None and current_platform.is_cuda()
        reason = None
        if self._merges_patches or is_plain:
            reason = self._why_not_merging(adapts_tower(vllm_config))
        if self._merges_patches and reason is not None:
            raise ValueError(f"{TOWER_MERGING_MAX_RATIO} {reason}; or set it to 0")
        self._replaces_attention = is_plain and reason is None

    def _why_not_merging(self, adapts: bool) -> str | None:
        """Return why the tower cannot merge patches, None if it can."""
        if isinstance(self.visual, StageMissingLayer):
            return "needs a tower in this stage"
        if adapts:
            return "and adapters of the vision tower exclude each other"
        from scissor_vllm.worker.merged_grid import why_not_merging

        return why_not_merging(self.visual)

    @property
    def row_width(self) -> int:
        """Number of values in a row."""
        return self.token_width

    @property
    def video_token(self) -> int:
        """Token id of a video's placeholders, apart from text within the video."""
        return int(self.config.video_token_id)

    @property
    def token_width(self) -> int:
        """Number of a row's first values, which compression compares."""
        return int(self.config.vision_config.out_hidden_size)

    def _full_video_tokens(self, fields: Mapping[str, Any]) -> list[int]:
        """Return a video's token ids in the uncompressed prompt, with the text within the video."""
        num_tokens = int(fields[_GRID].prod())
        num_tokens //= self.config.vision_config.spatial_merge_size**2
        return with_text(fields[VIDEO_TEXT], num_tokens, self.video_token)

    def _embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (n, ``row_width``) of text within a video."""
        return pad_to(super()._embed_text(tokens), self.row_width)

    def _tower_of_compressed(self) -> AbstractContextManager[Any]:
        """Return a context in which the tower encodes compressed videos, equal up to rounding."""
        # A compiled tower has the kernels of its first call, also for images and at 1.0.
        return nullcontext() if self._compiles_tower else fused_norms()

    # Rows.

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Return the rows of all placeholders of each video, in order.

        Rows of a compressed video have their positions behind their values. Images, and batches of
        uncompressed videos, are encoded as by vLLM's class.
        """
        parameter = next(self.visual.parameters())
        if self.video_compression.warm_up(self.token_width, parameter.dtype, parameter.device):
            self._warm_up_tower()
        num_retained = kwargs.pop(NUM_RETAINED, None)
        kwargs.pop(NUM_VIDEO_TOKENS, None)
        kwargs.pop(NUM_ENCODED_TOKENS, None)
        if not isinstance(num_retained, torch.Tensor):
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        counts = num_retained.flatten().tolist()
        videos = self._take_videos(kwargs)
        if self.video_compression.keeps_all([video.pixels for video in videos], counts):
            pixels = [self._patches(video.pixels.whole().flatten(0, 1), video) for video in videos]
            kwargs[_PIXELS] = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
            with self.video_compression.stage("tower", parameter.device):
                return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        with self.video_compression.overlapping(len(videos), parameter.device):
            return tuple(map(self._encoded, videos, counts))

    def _warm_up_tower(self) -> None:
        """Prepare the tower of compressed videos while vLLM profiles memory.

        It allocates memory that stays, and no request waits for the compilation of kernels.
        """
        if self._merges_patches or self._replaces_attention:
            with self._tower_of_compressed():
                self._merging().warm_up()

    def _merging(self) -> Any:
        """Return the ``MergingTower``."""
        from scissor_vllm.worker.merged_grid import MAX_GRAPH_PATCHES, MergingTower

        if self._merging_tower is None:
            merged = self.config.vision_config.spatial_merge_size**2
            most = min(MAX_GRAPH_PATCHES, self.video_compression.budget * merged)
            has_graphs = self._merges_patches and not self._is_eager
            self._merging_tower = MergingTower(self.visual, most if has_graphs else 0)
        return self._merging_tower

    def _forget_merging(self) -> None:
        """Drop what was made of old weights: embeddings of positions, and graphs."""
        if self._merging_tower is not None:
            self._merging_tower.forget()
            self._merging_tower = None

    def forget_encoded(self) -> None:
        """Drop what was made of old weights, see ``forget_with_encoder_cache``."""
        super().forget_encoded()
        self._forget_merging()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights as vLLM does, and drop what was made of the old ones."""
        self._forget_merging()
        return super().load_weights(weights)

    def _take_videos(self, fields: dict[str, Any]) -> list["GridVideo"]:
        """Return a batch's videos, and remove our fields from the batch."""
        grids = fields[_GRID].tolist()
        nothing = [None] * len(grids)
        sizes = fields.pop(FRAME_SIZE, nothing)
        normalizations = fields.pop(PIXEL_NORMALIZATION, nothing)
        identities = fields.pop(VIDEO_IDENTITY, nothing)
        anchors = fields.pop(PATCH_ANCHORS, nothing)
        keeps_every_frame = take_every_frame(fields, len(grids))
        texts = fields.pop(VIDEO_TEXT, nothing)
        side = self.config.vision_config.spatial_merge_size
        pixels: list[torch.Tensor | ComputedPlaces] = []
        if VIDEO_PLACES in fields:
            pixels += [
                ComputedPlaces(places, anchors[index], (h // side, w // side))
                for index, (places, (_, h, w)) in enumerate(
                    zip(fields.pop(VIDEO_PLACES), grids, strict=True)
                )
            ]
        else:
            rows = fields[_PIXELS].split([t * h * w for t, h, w in grids])
            pixels += [
                patches.view(t, h * w, -1) for patches, (t, h, w) in zip(rows, grids, strict=True)
            ]
        return [
            GridVideo(
                VideoPixels(
                    patches,
                    frame_shape=(h * w, -1),
                    identity=None if identity is None else identity.numpy().tobytes(),
                    tokens_per_frame=h * w // side**2,
                    anchors=anchors[index],
                    keeps_every_frame=keeps_every_frame[index],
                    model_device=next(self.visual.parameters()).device,
                ),
                {
                    VIDEO_TEXT: text,
                    **{name: fields[name][index] for name in self.place_fields if name in fields},
                },
                None if size is None else tuple(size.tolist()),
                normalization,
            )
            for index, (patches, (_, h, w), text, size, normalization, identity) in enumerate(
                zip(pixels, grids, texts, sizes, normalizations, identities, strict=True)
            )
        ]

    def _patches(self, rows: torch.Tensor, video: "GridVideo") -> torch.Tensor:
        """Return the tower's patches (n, values of a patch) of consecutive temporal patches."""
        rows = to_device(rows, video.pixels.device)
        if video.frame_size is None:
            return rows
        vision = self.config.vision_config
        shape = PatchShape(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        return shape.patches_of(rows, video.frame_size, video.normalization, self.pixel_dtype)

    def _encoded(self, video: "GridVideo", num_retained: int) -> torch.Tensor:
        """Return a video's rows, with positions if it is compressed."""
        is_whole = self.video_compression.keeps_all([video.pixels], [num_retained])
        replaces_attention = self._replaces_attention and not is_whole

        def encode(pixels: torch.Tensor, anchors: torch.Tensor | None = None) -> torch.Tensor:
            if anchors is None and replaces_attention:
                # Nothing is merged, and the GPU takes 10 to 20 % less than for vLLM's layers.
                num_tokens = pixels.shape[1] // self.config.vision_config.spatial_merge_size**2
                anchors = torch.arange(len(pixels))[:, None].expand(-1, num_tokens)
            if anchors is not None:
                return self._encode_merged(video, pixels, anchors)
            # The tower attends within a temporal patch, so parts have the tokens of the whole.
            # With several ranks vLLM gives each a part.
            num_ranks = 1 if is_whole else self._num_tower_ranks
            lengths = torch.tensor(shared_lengths([1] * len(pixels), num_ranks))
            grids = video.fields[_GRID].repeat(len(lengths), 1)
            grids[:, 0] = lengths
            inputs = self._parse_and_validate_video_input(  # type: ignore[attr-defined]
                pixel_values_videos=self._patches(pixels.flatten(0, 1), video),
                video_grid_thw=grids,
            )
            with nullcontext() if is_whole else self._tower_of_compressed():
                parts = self._process_video_input(inputs)  # type: ignore[attr-defined]
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
            return rows.view(len(pixels), -1, rows.shape[-1])

        width = self.token_width
        tokens, compressed = self.video_compression.compressed(
            video.pixels, num_retained, encode, width
        )
        flat = tokens.flatten(0, 1)
        if num_retained == len(flat):
            return flat
        members = representative_members(tokens[..., :width], compressed)
        rows = compressed.tokens
        if width < flat.shape[1]:
            appended = member_means(flat[:, width:], compressed.assignment, members)
            rows = torch.cat([rows, appended], dim=1)
        members, order = members.sort(stable=True)
        return self._laid_out(rows[order], members, video.fields)

    def _encode_merged(
        self, video: "GridVideo", pixels: torch.Tensor, anchors: torch.Tensor
    ) -> torch.Tensor:
        """Return the tokens (t, P, D) of consecutive temporal patches, with patches merged.

        Args:
            video: of which they are.
            pixels: (t, patches, values of a patch).
            anchors: int64 (t, P) on the CPU, counted from the first of them.
        """
        _, rows, columns = video.fields[_GRID].tolist()

        def encode(pixels: torch.Tensor, anchors: torch.Tensor | None) -> torch.Tensor:
            assert anchors is not None
            patches = self._patches(pixels.flatten(0, 1), video)
            with self._tower_of_compressed():
                grid = (len(pixels), rows, columns)
                tokens: torch.Tensor = self._merging().encode(patches, grid, anchors)
                return tokens

        if self._num_tower_ranks == 1:
            return encode(pixels, anchors)
        return encode_on_all_ranks(encode, pixels, anchors, self._num_tower_ranks)

    def _laid_out(
        self, rows: torch.Tensor, members: torch.Tensor, fields: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return rows and text in order, with their positions if the model carries them.

        Args:
            rows: (K, D), in the order of ``members``.
            members: (K,) int64 ascending, each row's representative among the video's tokens.
            fields: the video's ``place_fields``.
        """
        rows, numbers = self._among_text(rows, members, fields[VIDEO_TEXT])
        if not self.carries_positions:
            return rows
        layout = self._layout(fields)
        place = VideoPlace(
            num_rows=len(rows),
            first_pad=int(layout.video.pads[0]),
            num_pads=len(members),
            end=layout.end,
        )
        return with_positions(rows, layout.positions_on(rows.device)[:, numbers], place)

    # Positions.

    def _whole_positions(
        self, tokens: list[int], features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        stock = super(CarriedPositionsModel, self).get_mrope_input_positions  # type: ignore[misc]
        positions: tuple[torch.Tensor, int] = stock(tokens, features)
        return positions


@dataclass(frozen=True)
class GridVideo:
    """One video of a batch."""

    pixels: VideoPixels
    """(T, patches, values of a patch), with a temporal patch in place of each frame."""
    fields: Mapping[str, Any]
    """The model's ``place_fields``."""
    frame_size: tuple[int, int] | None
    """``FRAME_SIZE``, None if the pixels are patches already."""
    normalization: torch.Tensor | None
    """``PIXEL_NORMALIZATION``, None if the pixels are normalized or vLLM's class does it."""


def pad_to(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return rows (n, ``width``) with zeros appended."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
