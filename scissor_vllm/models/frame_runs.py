"""Mixins for families with text within a video: runs of video tokens with times or marks between.

K is known before the vision tower runs. The number of rows in each frame's run is known only after
encoding. So the text travels inside the embeddings:
- The prompt has K placeholders in a row, then the video's text. ``embed_multimodal`` returns one
  row for each of them, in their true order, with the text's embeddings among them. The
  placeholders' token ids are never embedded.
- A merged row belongs to the run of the frame of its representative member.
- All of the text stays. A frame without kept tokens has its time and an empty run.

The processor sends the text with the video (``VIDEO_TEXT``), so a worker needs no tokenizer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement
from vllm.multimodal.processing.processor import PromptUpdateDetails

from scissor_vllm.compression.members import representative_members
from scissor_vllm.frontend.frame_transport import identity_of
from scissor_vllm.frontend.processor import RetentionProcessor
from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.metrics import Reason
from scissor_vllm.retention import (
    MAX_RETAINED_VIDEO_TOKENS,
    RETENTION_RATIO,
    Chooser,
    RetainedCounts,
)
from scissor_vllm.settings import without_own_keys
from scissor_vllm.video_fields import (
    NUM_ENCODED_TOKENS,
    NUM_RETAINED,
    NUM_VIDEO_TOKENS,
    VIDEO_IDENTITY,
    VIDEO_TEXT,
)
from scissor_vllm.vllm_compat import forget_with_encoder_cache
from scissor_vllm.worker.pinned import to_device
from scissor_vllm.worker.positions import text_and_pads
from scissor_vllm.worker.video_compression import VideoCompression
from scissor_vllm.worker.video_pixels import VideoPixels


def text_within(tokens: Sequence[int], pad: int) -> torch.Tensor:
    """Return ``VIDEO_TEXT`` of an uncompressed video's token ids; ``pad`` is the video token."""
    text, _ = text_and_pads(tokens, pad)
    ids = torch.tensor(tokens, dtype=torch.int64)[text]
    return torch.stack([ids, text - torch.arange(len(text))])


def with_text(text: torch.Tensor, num_tokens: int, pad: int) -> list[int]:
    """Return an uncompressed video's token ids from its ``VIDEO_TEXT`` and N."""
    ids, num_before = text
    tokens = torch.full((num_tokens + len(ids),), pad)
    tokens[num_before + torch.arange(len(ids))] = ids
    return [int(token) for token in tokens.tolist()]


class FrameRunsProcessor(RetentionProcessor):
    """Mixin of a family's processor, placed before vLLM's class."""

    def _video_pad(self) -> int:
        """Return the token id of a video's placeholders."""
        return int(self.info.get_hf_config().video_token_id)

    def _count_retained(
        self,
        options: Mapping[str, object],
        num_tokens: list[int | None],
        ratio: float | Chooser,
        budget: int | None,
        num_images: list[int],
        highest: float,
    ) -> RetainedCounts:
        reason = self._why_not_compressed(options)
        if reason is None:
            return super()._count_retained(options, num_tokens, ratio, budget, num_images, highest)
        # A ratio that the server chooses becomes 1.0.
        if isinstance(ratio, float) and ratio != 1.0:
            raise RefusedRequestError(
                f"{RETENTION_RATIO} must be 1.0 or absent, got {ratio}: {reason}",
                parameter=RETENTION_RATIO,
                reason=Reason.UNSUPPORTED_MODEL,
            )
        known = [count for count in num_tokens if count is not None]
        is_known = len(known) == len(num_tokens)
        if budget is None or (is_known and sum(known) <= budget):
            return super()._count_retained(options, num_tokens, 1.0, None, num_images, highest)
        rule = f"at least {sum(known)} or absent" if is_known else "absent"
        raise RefusedRequestError(
            f"{MAX_RETAINED_VIDEO_TOKENS} must be {rule}, got {budget}: {reason}",
            parameter=MAX_RETAINED_VIDEO_TOKENS,
            reason=Reason.UNSUPPORTED_MODEL,
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            **super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs),
            VIDEO_TEXT: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        }

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        processed = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if NUM_RETAINED not in processed:
            return processed
        pad = self._video_pad()
        texts = []
        for index, tokens in enumerate(self._stock_video_tokens(processed, mm_items, hf_kwargs)):
            num_tokens, num_pads = int(processed[NUM_VIDEO_TOKENS][index]), tokens.count(pad)
            if num_pads != num_tokens:
                raise VLLMValidationError(
                    f"video {index} has {num_tokens} tokens by its frames, but its prompt has room "
                    f"for {num_pads}: its metadata names other frames than were decoded; send a "
                    "file whose header agrees with its frames",
                    parameter="video_url",
                )
            texts.append(text_within(tokens, pad))
        if RETENTION_RATIO in hf_kwargs:
            processed[VIDEO_TEXT] = texts
        return processed

    def _stock_video_tokens(
        self,
        processed: BatchFeature,
        mm_items: MultiModalDataItems,
        hf_kwargs: Mapping[str, object],
    ) -> list[list[int]]:
        """Return the token ids that vLLM would put into the prompt for each video."""
        options = without_own_keys(hf_kwargs)
        items = MultiModalKwargsItems.from_hf_inputs(
            processed, self._get_mm_fields_config(processed, options)
        )
        updates = super(RetentionProcessor, self)._get_prompt_updates(
            mm_items=mm_items, hf_processor_mm_kwargs=options, out_mm_kwargs=items
        )
        (update,) = (
            update
            for update in updates
            if update.modality == "video" and isinstance(update, PromptReplacement)
        )
        return [_tokens_of(update, index) for index in range(len(items["video"]))]

    def _shortened(self, content: Any, num_retained: int) -> PromptUpdateDetails:
        """Return K video tokens, at the place of the first of N, and all text."""
        pad = self._video_pad()
        tokens = content.full if isinstance(content, PromptUpdateDetails) else content
        first = tokens.index(pad)
        text_behind = [token for token in tokens[first:] if token != pad]
        return PromptUpdateDetails.from_seq([*tokens[:first], *[pad] * num_retained, *text_behind])


def _tokens_of(update: PromptReplacement, index: int) -> list[int]:
    content: Any = update.replacement
    content = content(index) if callable(content) else content
    return list(content.full if isinstance(content, PromptUpdateDetails) else content)


class FrameRunsModel:
    """Mixin of a family's model, placed before vLLM's class."""

    video_compression: VideoCompression

    has_text_within: ClassVar[bool] = True
    """Whether text stands within a video. Its rows are the language model's embeddings."""

    def _check_options(self, vllm_config: VllmConfig) -> None:
        """Raise ValueError if vLLM prunes videos, or has no embeddings for text within them."""
        mm_config = vllm_config.model_config.get_multimodal_config()
        if mm_config.is_multimodal_pruning_enabled():
            raise ValueError(
                "--video-pruning-rate and scissor_vllm exclude each other: leave the first out and "
                "send a retention_ratio, or start vLLM with VLLM_PLUGINS= to prune"
            )
        if self.has_text_within and mm_config.mm_encoder_only:
            raise ValueError(
                "an encode-only instance (--mm-encoder-only, or ec_role ec_producer) loads no "
                "language model, whose embeddings this model's videos need for the text within "
                "them: use ec_role ec_both, or start vLLM with VLLM_PLUGINS= to serve without "
                "ratios"
            )

    def forget_encoded(self) -> None:
        """Drop cached features of old weights, see ``forget_with_encoder_cache``."""
        self.video_compression.forget_features()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights as vLLM does, and drop cached features; also called while serving."""
        self.video_compression.forget_features()
        return super().load_weights(weights)  # type: ignore[misc]

    def get_encoder_cudagraph_config(self) -> Any:
        """Return vLLM's config without videos: its graphs would bypass our ``embed_multimodal``."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        modalities = [modality for modality in config.modalities if modality != "video"]
        return replace(config, modalities=modalities, max_frames_per_video=1)

    def _embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (n, D) of text within a video."""
        embedded: torch.Tensor = self.get_language_model().embed_input_ids(tokens)  # type: ignore[attr-defined]
        return embedded

    def _among_text(
        self, rows: torch.Tensor, members: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and text in order, and the index of each in the uncompressed video.

        Args:
            rows: (K, D), in the order of ``members``.
            members: (K,) int64 ascending, each row's representative among the video's tokens.
            text: ``VIDEO_TEXT``.

        Returns:
            (K + n, D) and (K + n,) int64 ascending.
        """
        ids, num_before = to_device(text, rows.device)
        if len(ids) == 0:
            return rows, members
        places = num_before + torch.arange(len(ids), device=rows.device)
        moved = members + torch.searchsorted(num_before, members, right=True)
        numbers, order = torch.cat([places, moved]).sort()
        embedded = self._embed_text(ids).to(rows.dtype)
        return torch.cat([embedded, rows])[order], numbers


@dataclass(frozen=True)
class FramesOfVideo:
    """One video of a batch, and how its frames are encoded."""

    pixels: torch.Tensor
    """(T, ...): the tower's input of each frame, or the index that ``encode`` knows a frame by."""
    tokens_per_frame: int
    """P."""
    encode: Callable[[torch.Tensor], torch.Tensor]
    """Returns the tokens (t, P, D) of consecutive frames of ``pixels``."""


class SequentialFrameRunsModel(FrameRunsModel):
    """Mixin of a model with 1-D positions, whose tower takes a video's frames one by one."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self._check_options(vllm_config)
        forget_with_encoder_cache()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.video_compression = VideoCompression(vllm_config, self.tokens_per_frame)

    # A family defines these.

    @property
    def tokens_per_frame(self) -> int:
        """P; an estimate where P differs by video."""
        raise NotImplementedError

    @property
    def row_width(self) -> int:
        """D."""
        return int(self.config.get_text_config().hidden_size)  # type: ignore[attr-defined]

    def _videos(self, fields: dict[str, Any], num_tokens: list[int]) -> list[FramesOfVideo]:
        """Return a batch's videos.

        Args:
            fields: the fields that vLLM's class takes.
            num_tokens: N of each video.
        """
        raise NotImplementedError

    # Model runners call this.

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Return the rows of all placeholders of each video, in order.

        Images, and batches of uncompressed videos, are encoded as by vLLM's class.
        """
        parameter = next(self.parameters())  # type: ignore[attr-defined]
        self.video_compression.warm_up(self.row_width, parameter.dtype, parameter.device)
        num_retained = kwargs.pop(NUM_RETAINED, None)
        num_tokens = kwargs.pop(NUM_VIDEO_TOKENS, None)
        kwargs.pop(NUM_ENCODED_TOKENS, None)
        texts = kwargs.pop(VIDEO_TEXT, None)
        identities = kwargs.pop(VIDEO_IDENTITY, None)
        stock = super().embed_multimodal  # type: ignore[misc]
        if num_retained is None or num_retained.equal(num_tokens):
            with self.video_compression.stage("tower", parameter.device):
                whole: MultiModalEmbeddings = stock(**kwargs)
                return whole
        counts = num_retained.flatten().tolist()
        videos = self._videos(kwargs, num_tokens.flatten().tolist())
        names = [None] * len(videos) if identities is None else identities
        with self.video_compression.overlapping(len(videos), parameter.device):
            return tuple(
                self._rows(video, count, text, name)
                for video, count, text, name in zip(videos, counts, texts, names, strict=True)
            )

    def _rows(
        self,
        video: FramesOfVideo,
        num_retained: int,
        text: torch.Tensor,
        identity: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return a video's rows, with its text among them if the video is compressed."""
        pixels = VideoPixels(
            video.pixels,
            identity=None if identity is None else identity.numpy().tobytes(),
            tokens_per_frame=video.tokens_per_frame,
        )
        tokens, compressed = self.video_compression.compressed(pixels, num_retained, video.encode)
        flat = tokens.flatten(0, 1)
        if num_retained == len(flat):
            return self._whole_rows(flat, text)
        members, order = representative_members(tokens, compressed).sort(stable=True)
        rows, _ = self._among_text(compressed.tokens[order], members, text)
        return rows

    def _whole_rows(self, rows: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return the rows of an uncompressed video's placeholders."""
        return rows


class SequentialFrameRunsProcessor(FrameRunsProcessor):
    """Mixin of a processor for a ``SequentialFrameRunsModel``; vLLM's fields carry the pixels."""

    pixel_fields: tuple[str, ...]
    """Names of the fields that determine a video's tokens; the feature cache hashes them."""

    def _prepare(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object], ratio: float
    ) -> BatchFeature:
        # Skip the transport of resized frames, which only LLaVA's models take.
        processed: BatchFeature = super(RetentionProcessor, self)._apply_hf_processor_main(
            mm_items=mm_items, hf_kwargs=hf_kwargs
        )
        if "video" in mm_items and ratio != 1.0 and self.info.cache_sizes.features > 0:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            items = MultiModalKwargsItems.from_hf_inputs(
                processed, super()._get_mm_fields_config(processed, hf_kwargs)
            )
            processed[VIDEO_IDENTITY] = [
                identity_of(
                    algorithm, **{name: _bytes_of(item[name]) for name in self.pixel_fields}
                )
                for item in items["video"]
            ]
        return processed


def _bytes_of(field: Any) -> torch.Tensor:
    """Return a field's values as bytes: NumPy has no bfloat16."""
    return torch.as_tensor(field.data).contiguous().view(torch.uint8)
