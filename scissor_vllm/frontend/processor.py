"""The multimodal processor, for all models: computes K, and gives a video K placeholders.

vLLM counts a video's placeholders before the vision tower runs. So K depends only on the number of
frames, the tokens of a frame, the ratio and the request's budget. It is computed once for each
request, and travels to the model as the field ``num_retained`` of each video. The model returns
exactly K rows.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    PromptReplacement,
    PromptUpdate,
)
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import PromptUpdateDetails

from scissor_vllm.frontend.computed_places import places_of_videos
from scissor_vllm.frontend.frame_transport import identity_of, resized_frames, without_repeats
from scissor_vllm.frontend.patch_anchors import (
    anchors_of_videos,
    count_patches,
    encoded_share,
)
from scissor_vllm.frontend.placeholders import VideoPlaceholders, fill_report
from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.frontend.request_settings import RequestSettings, settings_in_force
from scissor_vllm.frontend.video_items import (
    frames_of,
    num_images_of,
    pixels_of_videos,
    why_unreadable,
)
from scissor_vllm.metrics import CLOCK, Reason
from scissor_vllm.retention import (
    MAX_BUDGET,
    MAX_RETAINED_VIDEO_TOKENS,
    RETENTION,
    RETENTION_RATIO,
    RETENTION_REPORT,
    BudgetTooSmallError,
    Chooser,
    RatioTooSmallError,
    RetainedCounts,
    RetentionReport,
    count_retained,
    highest_ratio,
    least_ratio,
)
from scissor_vllm.settings import OWN_KEYS, without_own_keys
from scissor_vllm.video_fields import (
    FRAME_OF,
    KEEPS_EVERY_FRAME,
    KEPT_ON_CPU,
    NUM_ENCODED_TOKENS,
    NUM_RETAINED,
    NUM_VIDEO_TOKENS,
    PATCH_ANCHORS,
    PIXEL_NORMALIZATION,
    TOWER_FP8,
    VIDEO_FRAMES,
    VIDEO_IDENTITY,
    VIDEO_PLACES,
)


@dataclass
class _Request(ProcessorInputs):
    """vLLM's inputs of a request with a video, with the settings in force."""

    ratio: float = 1.0
    """The ratio in force."""
    budget: int | None = None
    """The budget in force, None for no limit."""
    report: RetentionReport | None = None


class RetentionProcessor(BaseMultiModalProcessor[Any]):
    """Mixin of a model's processor, placed before vLLM's class."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Return the engine's input for a request, with its ratio checked and K computed."""
        kwargs = inputs.hf_processor_mm_kwargs
        has_video = "video" in inputs.mm_data_items
        if not has_video and OWN_KEYS.isdisjoint(kwargs):
            return super().apply(inputs, timing_ctx)
        videos = pixels_of_videos(inputs.mm_data_items)
        media_io_kwargs = dict(inputs.media_io_kwargs)
        over_http = media_io_kwargs.pop(RETENTION, {})
        is_embedded = has_video and videos is None
        settings = settings_in_force(self.info.retention_policy, kwargs, over_http, is_embedded)
        report = over_http.get(RETENTION_REPORT)
        request = _Request(
            **{
                **vars(inputs),
                "hf_processor_mm_kwargs": without_own_keys(kwargs),
                "media_io_kwargs": media_io_kwargs,
            },
            budget=settings.budget,
            report=report if isinstance(report, RetentionReport) else None,
        )
        if videos is None:
            return super().apply(request, timing_ctx)
        if request.report is not None:
            request.report.look(videos)
        try:
            self._set_counts(request, videos, settings)
            result = super().apply(request, timing_ctx)
        except (ArithmeticError, AssertionError, IndexError, TypeError) as error:
            # Video processors trust the metadata of a client's file.
            reason = why_unreadable(videos)
            if reason is None:
                raise
            raise RefusedRequestError(
                reason, parameter="video_url", reason=Reason.UNREADABLE_VIDEO
            ) from error
        self._check_room(request, result)
        return result

    def _set_counts(
        self, request: _Request, videos: VideoProcessorItems, settings: RequestSettings
    ) -> None:
        """Put K of each video, and the ratio in force, into a request's options."""
        options = dict(request.hf_processor_mm_kwargs)
        num_tokens = self._get_num_video_tokens(videos, options)
        if settings.is_default_budget and None in num_tokens:
            # A budget is divided by lengths, and the length of a cached video is unknown.
            request.budget = None
        num_images = num_images_of(videos)
        counts = self._count_retained(
            options,
            num_tokens,
            settings.ratio,
            request.budget,
            num_images,
            self._highest_ratio(request, num_tokens),
        )
        if request.report is not None:
            request.report.num_images = sum(num_images)
        options[RETENTION] = counts
        # Without the key for ratio 1.0, cache entries are those of stock vLLM.
        if counts.ratio != 1.0:
            options[RETENTION_RATIO] = counts.ratio
        request.hf_processor_mm_kwargs, request.ratio = options, counts.ratio

    def _count_retained(
        self,
        options: Mapping[str, object],
        num_tokens: list[int | None],
        ratio: float | Chooser,
        budget: int | None,
        num_images: list[int],
        highest: float,
    ) -> RetainedCounts:
        """Return K of each video by N.

        Args:
            options: of the request, for the processor.
            num_tokens: N of each video, None where it is not known.
            ratio: of the request, or what chooses it.
            budget: of the request, None for no limit.
            num_images: of each video that is a run of images, 0 for any other.
            highest: ratio that may be chosen.

        Raises:
            RefusedRequestError: the ratio or the budget is too small for them, or a video too long
                to be compressed.
        """
        policy = self.info.retention_policy
        if not isinstance(ratio, float):
            least = [
                least_ratio(count, length)
                for count, length in zip(num_tokens, num_images, strict=True)
                if count is not None and length > 0
            ]
            ratio = ratio(num_tokens, max(least, default=0.0), highest)
        try:
            counts = count_retained(num_tokens, ratio, budget, policy.min_ratio, num_images)
        except RatioTooSmallError as error:
            raise RefusedRequestError(
                str(error), parameter=RETENTION_RATIO, reason=Reason.RATIO_BELOW_MINIMUM
            ) from error
        except BudgetTooSmallError as error:
            raise RefusedRequestError(
                str(error),
                parameter=MAX_RETAINED_VIDEO_TOKENS,
                reason=Reason.BUDGET_TOO_SMALL,
            ) from error
        for count in num_tokens:
            if count is None:
                continue
            try:
                policy.check_num_tokens(count, counts.ratio)
            except ValueError as error:
                raise RefusedRequestError(
                    str(error), parameter="video_url", reason=Reason.VIDEO_TOO_LONG
                ) from error
        return counts

    def _highest_ratio(self, request: _Request, num_tokens: list[int | None]) -> float:
        """Return the highest ratio that the engine takes, 0 for none.

        Each video must fit into a step, and all into the prompt. Text within videos and images are
        not counted.
        """
        known = [count for count in num_tokens if count]
        num_fixed = self.info.get_num_fixed_tokens()
        if request.report is None or request.report.max_engine_tokens is None or not known:
            return 1.0
        most = request.report.max_engine_tokens
        # At least one token is answered.
        left = self.info.ctx.model_config.max_model_len - len(request.prompt) - 1
        together = left - num_fixed * len(known)
        return min(
            highest_ratio(max(known), max(0, most - num_fixed)),
            highest_ratio(sum(known), max(0, together)),
        )

    def _why_not_compressed(self, options: Mapping[str, object]) -> str | None:
        """Return why a request's videos cannot be compressed, None if they can."""
        return None

    def _check_room(self, request: _Request, result: Any) -> None:
        """Raise RefusedRequestError if a video has more tokens than the engine takes.

        Args:
            request: with K of each video.
            result: of ``apply``; among a video's placeholders is its text.
        """
        if request.report is None or request.report.max_engine_tokens is None:
            return
        most = request.report.max_engine_tokens
        options = request.hf_processor_mm_kwargs
        counts = options[RETENTION]
        assert isinstance(counts, RetainedCounts)
        places = result["mm_placeholders"].get("video", ())
        for place, count, num_retained in zip(
            places, counts.num_tokens, counts.num_retained, strict=True
        ):
            num_taken = place.get_num_embeds()
            if num_taken <= most:
                continue
            lower = ""
            if count is not None and num_retained is not None:
                # Below 1.0 a video's text counts too.
                num_others = place.length - num_retained
                highest = highest_ratio(count, max(0, most - num_others))
                is_allowed = highest > 0 and self.info.retention_policy.min_ratio <= highest
                if is_allowed and self._why_not_compressed(options) is None:
                    lower = f"ask for a {RETENTION_RATIO} of {highest} or less, "
            raise RefusedRequestError(
                f"a video may have {most} tokens after compression on this server, got one that "
                f"has {num_taken}: {lower}send fewer frames, or have the operator raise "
                "--max-num-batched-tokens",
                parameter="video_url",
                reason=Reason.VIDEO_TOO_LONG,
            )

    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Return vLLM's result, and fill the request's report.

        A video may come from vLLM's cache by its ``uuid``, whatever was sent with it. The report
        describes the video that is used.
        """
        result = super()._cached_apply_hf_processor(inputs, timing_ctx)
        if isinstance(inputs, _Request) and inputs.report is not None:
            inputs.report.max_retained = inputs.budget
            fill_report(inputs.report, inputs.ratio, result.prompt_updates)
        return result

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Return vLLM's worst case for memory profiling, uncompressed whatever the default."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {
            **inputs.hf_processor_mm_kwargs,
            RETENTION_RATIO: 1.0,
            MAX_RETAINED_VIDEO_TOKENS: MAX_BUDGET,
        }
        return inputs

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return vLLM's inputs for memory profiling, which no metric counts."""
        with CLOCK.silenced():
            return super().get_dummy_mm_inputs(*args, **kwargs)

    def _get_num_video_tokens(
        self, videos: VideoProcessorItems, kwargs: Mapping[str, object]
    ) -> list[int | None]:
        """Return N of each video, None for a video that is named by its id in the cache."""
        options = without_own_keys(kwargs)
        counts: list[int | None] = []
        for index, video in enumerate(videos.get_all()):
            if video is None:
                counts.append(None)
                continue
            num_frames = self._count_frames(video, options)
            if num_frames < 1:
                raise RefusedRequestError(
                    f"a video must have at least one frame, video {index} has {num_frames}: send a "
                    "file that can be decoded",
                    parameter="video_url",
                    reason=Reason.UNREADABLE_VIDEO,
                )
            size = frames_of(video).get_frame_size(0)
            counts.append(self._count_tokens(size.width, size.height, num_frames, options))
        return counts

    def _count_frames(self, video: Any, options: Mapping[str, object]) -> int:
        """Return the number of a video's frames that the Hugging Face processor prepares."""
        return frames_of(video).get_num_frames(0)

    def _count_tokens(
        self, width: int, height: int, num_frames: int, options: Mapping[str, object]
    ) -> int:
        """Return N of a video, given a request's options for the processor."""
        return int(
            self.info.get_num_compressible_tokens(width=width, height=height, num_frames=num_frames)
        )

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        """Return cache keys; those of videos include the ratio or K, and the method."""
        kwargs = inputs.hf_processor_mm_kwargs
        plain = without_own_keys(kwargs)
        if RETENTION_RATIO not in kwargs:
            return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=plain))
        counts = kwargs.get(RETENTION)
        by_budget = isinstance(counts, RetainedCounts) and counts.is_budgeted
        ratio = kwargs[RETENTION_RATIO]
        if by_budget:
            # A budget decides K, which is added below, and how exact the tower is.
            merges = self.info.tower_merging.applies_to(counts.ratio)
            in_fp8 = self.info.tower_fp8.applies_to(counts.ratio)
            ratio = f"by budget{', merging' * merges}{', in FP8' * in_fp8}"
        of_video = {
            **plain,
            RETENTION_RATIO: ratio,
            # Servers with different methods may share a persistent cache.
            "video_compression": self.info.retention_policy.method,
            **self._tower_settings(),
        }
        hashes: dict[str, Any] = {}
        for modality, items in inputs.mm_data_items.items():
            only = replace(
                inputs,
                mm_data_items=MultiModalDataItems({modality: items}),
                hf_processor_mm_kwargs=of_video if modality == "video" else plain,
            )
            hashes.update(super()._get_mm_hashes(only))
        if by_budget:
            hashes["video"] = [
                f"{identity}-{num_retained}"
                for identity, num_retained in zip(hashes["video"], counts.num_retained, strict=True)
            ]
        return hashes

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        """Return the options for the videos that are not in the cache, with their counts."""
        kwargs = inputs.hf_processor_mm_kwargs
        # A family's class rearranges the options that it knows.
        plain = replace(inputs, hf_processor_mm_kwargs=without_own_keys(kwargs))
        missing = dict(super()._get_cache_missing_processor_kwargs(plain, mm_is_cached))
        if RETENTION_RATIO in kwargs:
            missing[RETENTION_RATIO] = kwargs[RETENTION_RATIO]
        counts = kwargs.get(RETENTION)
        if isinstance(counts, RetainedCounts):
            is_cached = mm_is_cached["video"]
            missing[RETENTION] = counts.at([i for i, cached in enumerate(is_cached) if not cached])
        return missing

    def _tower_settings(self) -> dict[str, object]:
        """Return the settings of the tower, on which a video's data depends."""
        settings = {"tower_merging": self.info.tower_merging, "tower_fp8": self.info.tower_fp8}
        return {name: repr(setting) for name, setting in settings.items() if setting.max_ratio > 0}

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        if NUM_RETAINED not in hf_inputs:
            return fields
        return {
            **fields,
            **dict.fromkeys(KEPT_ON_CPU, MultiModalFieldConfig.batched("video", keep_on_cpu=True)),
            PIXEL_NORMALIZATION: MultiModalFieldConfig.batched("video"),
        }

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        videos = pixels_of_videos(mm_items)
        if videos is None:
            return super()._apply_hf_processor_main(
                mm_items=mm_items, hf_kwargs=without_own_keys(hf_kwargs)
            )
        ratio = float(hf_kwargs.get(RETENTION_RATIO, 1.0))  # type: ignore[arg-type]
        counts = hf_kwargs.get(RETENTION)
        if not isinstance(counts, RetainedCounts):
            # vLLM called this without ``apply``.
            counts = count_retained(self._get_num_video_tokens(videos, hf_kwargs), ratio)
        # These videos are not in the cache, so each has pixels and N.
        num_tokens = [count for count in counts.num_tokens if count is not None]
        with CLOCK.stage("preprocess"):
            processed = self._prepare(mm_items, without_own_keys(hf_kwargs), ratio)
            for index, count in enumerate(num_tokens):
                self._check_num_tokens(processed, index, count)
            # An uncompressed video is encoded exactly.
            compresses_all = not any(map(operator.eq, counts.num_retained, num_tokens))
            if PATCH_ANCHORS in processed and compresses_all:
                self._leave_out_merged(processed)
        if num_tokens:
            processed[NUM_VIDEO_TOKENS] = torch.tensor(num_tokens)
            processed[NUM_ENCODED_TOKENS] = torch.tensor(
                [
                    math.ceil(count * encoded_share(processed, index))
                    for index, count in enumerate(num_tokens)
                ]
            )
            processed[NUM_RETAINED] = torch.tensor(counts.num_retained)
        if any(counts.num_images) and ratio != 1.0:
            processed[KEEPS_EVERY_FRAME] = torch.tensor(counts.num_images) > 0
        return processed

    def _prepare(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object], ratio: float
    ) -> BatchFeature:
        """Return the Hugging Face processor's output for the items.

        Videos are only resized if the worker can do the rest with the same result, see
        ``scissor_vllm.frontend.frame_transport``.
        """
        videos = self._resized_videos(mm_items, hf_kwargs)
        if videos:
            mm_items = MultiModalDataItems(
                {modality: items for modality, items in mm_items.items() if modality != "video"}
            )
        processed = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=hf_kwargs)
        if videos:
            self._put_videos(processed, videos, ratio)
        return processed

    def _put_videos(
        self,
        processed: BatchFeature,
        videos: list[tuple[torch.Tensor, torch.Tensor]],
        ratio: float,
    ) -> None:
        """Add resized videos to the processor's output, see ``frame_transport``."""
        frames = [resized for resized, _ in videos]
        normalizations = [normalization for _, normalization in videos]
        frame_of = [torch.arange(len(resized)) for resized in frames]
        if ratio != 1.0:
            deduplicated = [without_repeats(resized) for resized in frames]
            if any(len(different) < len(index) for different, index in deduplicated):
                frames = [different for different, _ in deduplicated]
                processed[FRAME_OF] = frame_of = [index for _, index in deduplicated]
        processed[VIDEO_FRAMES] = frames
        processed[PIXEL_NORMALIZATION] = normalizations
        anchors = []
        if self.info.tower_merging.applies_to(ratio):
            anchors = anchors_of_videos(
                frames, self.info.get_patch_size(), self.info.tower_merging.threshold
            )
        if anchors:
            processed[PATCH_ANCHORS] = anchors
        in_fp8 = torch.ones(len(frames), dtype=torch.bool)
        if self.info.tower_fp8.applies_to(ratio):
            processed[TOWER_FP8] = in_fp8
        # Only compressed videos are cached.
        if ratio != 1.0 and self.info.cache_sizes.features > 0:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            processed[VIDEO_IDENTITY] = [
                identity_of(
                    algorithm,
                    frames=pixels,
                    normalization=scale,
                    frame_of=index,
                    **({"anchors": anchors[number]} if anchors else {}),
                    **({"in_fp8": in_fp8[number]} if TOWER_FP8 in processed else {}),
                )
                for number, (pixels, scale, index) in enumerate(
                    zip(frames, normalizations, frame_of, strict=True)
                )
            ]

    def _leave_out_merged(self, processed: BatchFeature) -> None:
        """Replace videos by the pixels of the places that the tower computes."""
        processed[VIDEO_PLACES] = places_of_videos(
            processed.pop(VIDEO_FRAMES), processed[PATCH_ANCHORS], self.info.get_patch_size()
        )

    def _resized_videos(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return frames and normalization of every video, [] if a video needs vLLM's processing."""
        if "video" not in mm_items:
            return []
        hf_processor = self.info.get_hf_processor(**hf_kwargs)
        resized = []
        for video in mm_items.get_items("video", VideoProcessorItems).get_all():
            prepared = resized_frames(self.info.ctx, hf_processor, video, hf_kwargs)
            if prepared is None:
                return []
            resized.append(prepared)
        return resized

    def _check_num_tokens(self, processed: BatchFeature, index: int, num_tokens: int) -> None:
        """Raise VLLMValidationError if a video's pixels do not give N tokens.

        Here the error ends one request. In the model it would end the engine.
        """
        prepared = self._get_num_prepared_tokens(processed, index)
        if prepared != num_tokens:
            raise VLLMValidationError(
                f"video {index} has {num_tokens} tokens by its frames, but its pixels as prepared "
                f"give {prepared}: the processor must not sample or drop frames, set num_frames in "
                "--media-io-kwargs instead",
                parameter="mm_processor_kwargs",
            )

    @abstractmethod
    def _get_num_prepared_tokens(self, processed: BatchFeature, index: int) -> int:
        """Return N of a video, counted from its prepared pixels."""

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=without_own_keys(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        if NUM_RETAINED not in next(iter(out_mm_kwargs.get("video", ())), {}):
            return updates
        ratio = float(hf_processor_mm_kwargs.get(RETENTION_RATIO, 1.0))  # type: ignore[arg-type]
        return [
            self._counted(update, out_mm_kwargs, ratio)
            if update.modality == "video" and isinstance(update, PromptReplacement)
            else update
            for update in updates
        ]

    def _counted(
        self, update: PromptReplacement, out_mm_kwargs: MultiModalKwargsItems, ratio: float
    ) -> PromptReplacement:
        """Return vLLM's replacement with K placeholders in place of N, and with both counts."""
        may_merge = self.info.tower_merging.applies_to(ratio)

        def replacement(index: int) -> VideoPlaceholders:
            item = out_mm_kwargs["video"][index]
            num_tokens, num_retained = (
                int(item[name].data) for name in (NUM_VIDEO_TOKENS, NUM_RETAINED)
            )
            stock = update.replacement
            content: Any = stock(index) if callable(stock) else stock
            if num_retained != num_tokens:
                content = self._shortened(content, num_retained)
            if not isinstance(content, PromptUpdateDetails):
                content = PromptUpdateDetails.from_seq(content)
            return VideoPlaceholders(
                content.full,
                content.is_embed,
                num_tokens=num_tokens,
                num_retained=num_retained,
                patches=self._count_patches(item)
                if may_merge and num_retained != num_tokens
                else None,
            )

        return replace(update, replacement=replacement)

    def _count_patches(self, item: Mapping[str, Any]) -> tuple[int, int] | None:
        """Return how many patches a compressed video has, and how many of them the tower computes.

        None for a video that went stock's way.
        """
        return count_patches(item, self.info.get_patch_size())

    def _shortened(self, content: Any, num_retained: int) -> Any:
        """Return K of a video's N placeholders, and the fixed ones after them."""
        return content[: num_retained + self.info.get_num_fixed_tokens()]
