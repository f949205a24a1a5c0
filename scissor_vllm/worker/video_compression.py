"""Encodes and compresses videos, for all models: bounded vision tower calls, exactly K rows."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    model_parallel_is_initialized,
)
from vllm.logger import init_logger
from vllm.utils.torch_utils import PIN_MEMORY

from scissor_vllm.compression import CompressedTokens, Compressor, get_compressor
from scissor_vllm.compression.every_frame import keep_every_frame
from scissor_vllm.compression.linkage import AverageLinkage
from scissor_vllm.compression.methods import warm_up_shapes
from scissor_vllm.compression.uniform import select_evenly
from scissor_vllm.metrics import (
    CLOCK,
    THRESHOLDS,
    begin_compression_at_zero,
    count_cache_query,
    count_cross_ratio_hit,
    record_threshold,
)
from scissor_vllm.settings import CacheSizes, RetentionPolicy
from scissor_vllm.worker.feature_cache import FeatureCache, Sharing
from scissor_vllm.worker.video_pixels import VideoPixels

logger = init_logger(__name__)

Watcher = Callable[[torch.Tensor, CompressedTokens], None]
"""Called with a video's tokens (T, P, D) and their compression."""


def make_feature_cache(vllm_config: VllmConfig) -> FeatureCache | None:
    """Return the feature cache of the operator's settings, None if it is switched off."""
    mm_config = vllm_config.model_config.get_multimodal_config()
    sizes = CacheSizes.of(mm_config.mm_processor_kwargs, mm_config.mm_processor_cache_gb)
    # With an adapter in the tower, tokens depend on more than the pixels.
    if sizes.features == 0 or adapts_tower(vllm_config):
        return None
    return FeatureCache(sizes.features, pin_memory=PIN_MEMORY, sharing=make_sharing())


def make_sharing() -> Sharing | None:
    """Return how workers share tokens by tensor parallelism, None for a single worker."""
    if not model_parallel_is_initialized() or get_tensor_model_parallel_world_size() == 1:
        return None
    return TensorParallelSharing()


class TensorParallelSharing(Sharing):
    """The first worker caches the tokens and broadcasts them between GPUs.

    This is faster than copies from host memory. All workers encode all videos in order.
    """

    def __init__(self) -> None:
        self._group = get_tp_group()
        self.is_owner = self._group.rank_in_group == 0

    def agree(self, value: bool) -> bool:
        """Return the first worker's value."""
        return bool(self._group.broadcast_object(value, src=0))

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the first worker's tokens."""
        shared: torch.Tensor = self._group.broadcast(tokens, src=0)
        return shared


def adapts_tower(vllm_config: VllmConfig) -> bool:
    """Return whether requests may name an adapter of the vision tower."""
    lora = vllm_config.lora_config
    return lora is not None and bool(lora.enable_tower_connector_lora)


CONNECTORS = ("ECExampleConnector",)
"""vLLM's connectors of encoder outputs that carry rows of any width."""


def check_connector(vllm_config: VllmConfig) -> None:
    """Raise ValueError if the engine exchanges embeddings by a connector that cannot carry rows.

    vLLM's other connectors size a transfer by the width of an uncompressed row, measured at
    startup. Rows that carry positions are wider. Where the instances would not know a video by the
    same name, it logs a warning.
    """
    transfer = vllm_config.ec_transfer_config
    connector = None if transfer is None else transfer.ec_connector
    if connector is None:
        return
    if connector in CONNECTORS:
        if _names_videos_by_order(vllm_config):
            logger.warning(
                "scissor_vllm: with --mm-processor-cache-gb 0 and no prefix caching vLLM names a "
                "video by its order of arrival, so a request may be answered from the rows of "
                "another video: set --mm-processor-cache-gb above 0 in both instances, or have "
                "every request name its videos by a uuid"
            )
        return
    raise ValueError(
        f"ec_connector of --ec-transfer-config must be {' or '.join(CONNECTORS)} with "
        f"scissor_vllm, got {connector}: it sizes a transfer by uncompressed rows, and a "
        "compressed video's are wider; change it, or start vLLM with VLLM_PLUGINS= to serve "
        "without ratios"
    )


def _names_videos_by_order(vllm_config: VllmConfig) -> bool:
    """Return whether vLLM hashes no video, and instances may name it differently."""
    mm_config = vllm_config.model_config.get_multimodal_config()
    return bool(
        mm_config.mm_processor_cache_gb == 0 and not vllm_config.cache_config.enable_prefix_caching
    )


@dataclass
class _Overlap:
    """The streams of videos that are encoded and compressed at a time."""

    main: torch.cuda.Stream
    """Encodes."""
    side: torch.cuda.Stream
    """Compresses."""
    held: list[torch.Tensor] = field(default_factory=list)
    """Tokens that ``side`` reads: their memory must not be used again on ``main`` before."""

    def leave(self, tokens: torch.Tensor) -> None:
        """Go on with a video's tokens on ``side``."""
        self.held.append(tokens)
        self.side.wait_stream(self.main)
        torch.cuda.set_stream(self.side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class VideoCompression:
    """Compresses videos one by one: pixels in, K rows of each video out.

    vLLM's scheduler admits videos by their placeholders. At ratio 0.1 it may admit ten times the
    frames of ratio 1.0. Here a tower call has frames of one video only, and at most as many as the
    encoder's token budget covers uncompressed. So memory stays below vLLM's at ratio 1.0, and a
    video's tokens do not depend on its batch.
    """

    def __init__(self, vllm_config: VllmConfig, tokens_per_frame: int) -> None:
        """Prepare compression for a model.

        Args:
            vllm_config: of the engine.
            tokens_per_frame: P, of videos that do not name theirs.

        Raises:
            ValueError: the engine exchanges embeddings by a connector that cannot carry its rows.
        """
        check_connector(vllm_config)
        mm_config = vllm_config.model_config.get_multimodal_config()
        policy = RetentionPolicy.from_mm_processor_kwargs(mm_config.mm_processor_kwargs)
        self.method = policy.method
        self._compress: Compressor = get_compressor(policy.method)
        self.budget = int(vllm_config.scheduler_config.max_num_encoder_input_tokens)
        """Most uncompressed tokens of a tower call."""
        self._tokens_per_frame = tokens_per_frame
        self._is_warm = False
        self._max_tokens = policy.max_video_tokens
        self._features = make_feature_cache(vllm_config)
        if self._is_recording():
            begin_compression_at_zero()
        self._watcher: Watcher | None = None
        self._overlap: _Overlap | None = None

    @contextmanager
    def overlapping(self, num_videos: int, device: torch.device) -> Iterator[None]:
        """Compress videos while the tower encodes the next ones of the context, on a GPU.

        Compression leaves most of a GPU idle: one program joins a window's tokens pair by pair. So
        it runs on a second stream, and so does all that the caller does with a video's rows. At
        the end of the context the caller's stream waits for the second one.

        Args:
            num_videos: so many calls of :meth:`compressed` follow; a single one has no next.
            device: of the tower.
        """
        if num_videos < 2 or device.type != "cuda" or self._is_shared():
            yield
            return
        main = torch.cuda.current_stream(device)
        self._overlap = overlap = _Overlap(main, _side_stream(device))
        try:
            yield
        finally:
            self._overlap = None
            torch.cuda.set_stream(main)
            main.wait_stream(overlap.side)

    def stage(self, name: str, device: torch.device) -> AbstractContextManager[None]:
        """Return a context whose time the first of the workers that share a model records."""
        return CLOCK.stage(name, device) if self._is_recording() else nullcontext()

    @staticmethod
    @cache
    def _is_recording() -> bool:
        return not model_parallel_is_initialized() or get_tensor_model_parallel_rank() == 0

    def warm_up(self, width: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Compress random tokens on the first call on a GPU; return whether this was that call.

        vLLM's first call profiles memory without compression. The warm-up adds the peak memory of
        compression, and compiles kernels before any request waits for them.
        """
        if self._is_warm or device.type != "cuda":
            return False
        self._is_warm = True
        generator = torch.Generator(device).manual_seed(0)
        for num_frames, per_frame, ratio in warm_up_shapes(self.method, self._max_tokens, device):
            shape = (num_frames, per_frame, width)
            tokens = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            self._compress(tokens, max(num_frames, int(num_frames * per_frame * ratio)))
        return True

    def keeps_all(self, videos: Sequence[VideoPixels], num_retained: list[int]) -> bool:
        """Return whether every video keeps all of its tokens."""
        return all(
            count == len(video) * self._num_tokens_per_frame(video)
            for video, count in zip(videos, num_retained, strict=True)
        )

    def _num_tokens_per_frame(self, video: VideoPixels) -> int:
        return video.tokens_per_frame or self._tokens_per_frame

    def compressed(
        self,
        video: VideoPixels,
        num_retained: int,
        encode: Callable[..., torch.Tensor],
        width: int | None = None,
    ) -> tuple[torch.Tensor, CompressedTokens]:
        """Return a video's tokens (T, P, D) and their compression.

        Args:
            video: T frames.
            num_retained: K.
            encode: returns tokens (t, P, D) of pixels (t, C, H, W) and, if the video has anchors,
                of the frames' anchors. A call has at most the frames of the encoder's budget.
            width: number of a token's first values to compress; None for all values.
        """
        is_whole = self.keeps_all([video], [num_retained])
        if is_whole and video.anchors is not None:
            # An uncompressed video is encoded exactly.
            video = replace(video, anchors=None)
        if self._overlap is not None:
            torch.cuda.set_stream(self._overlap.main)
        # Uncompressed videos are not cached: their tokens may differ in rounding.
        tokens = self._encoded(video, encode) if is_whole else self._tokens(video, encode)
        if self._overlap is not None:
            self._overlap.leave(tokens)
        if not is_whole:
            self._note_ratio(video, num_retained)
        compared = tokens if width is None else tokens[..., :width].contiguous()
        result = self._exactly(compared, num_retained, video)
        if self._watcher is not None:
            self._watcher(compared, result)
        return tokens, result

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Call the watcher with each video that is compressed in the context."""
        self._watcher = watcher
        try:
            yield
        finally:
            self._watcher = None

    def _tokens(self, video: VideoPixels, encode: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return (T, P, D), from the feature cache or from the tower."""
        if self._features is not None and video.identity is not None:
            kept = self._features.get(video.identity, video.device)
            if self._is_recording():
                count_cache_query("features", is_hit=kept is not None)
            if kept is not None:
                return kept
        tokens = self._encoded(video, encode)
        if self._features is not None and video.identity is not None:
            tree_bytes = 0
            if isinstance(self._compress, AverageLinkage):
                tree_bytes = self._compress.tree_bytes(tokens.shape[0] * tokens.shape[1])
            self._features.put(video.identity, tokens, tree_bytes)
        return tokens

    def _encoded(self, video: VideoPixels, encode: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return (T, P, D) from the tower."""
        with self.stage("tower", video.device):
            calls = video.split(max(1, self.budget // self._num_tokens_per_frame(video)))
            return video.repeated(torch.cat([encode(*call) for call in calls]))

    def _note_ratio(self, video: VideoPixels, num_retained: int) -> None:
        if self._features is None or video.identity is None:
            return
        is_cross_ratio = self._features.is_for_another_ratio(video.identity, num_retained)
        if is_cross_ratio and self._is_recording():
            count_cross_ratio_hit()

    def forget_features(self) -> None:
        """Drop cached features, because the tower's weights change."""
        if self._features is not None:
            self._features.clear()

    def _compress_or_cut(
        self, tokens: torch.Tensor, num_retained: int, identity: Hashable | None
    ) -> CompressedTokens:
        """Return K rows, by the video's cached tree if there is one."""
        method = self._compress
        if not isinstance(method, AverageLinkage) or self._features is None or identity is None:
            return method(tokens, num_retained)
        return method.cut(self._tree(method, tokens, identity), tokens, num_retained)

    def _tree(
        self, method: AverageLinkage, tokens: torch.Tensor, identity: Hashable | None
    ) -> torch.Tensor:
        """Return the video's tree, cached where it can be."""
        if self._features is None or identity is None:
            return method.tree(tokens)
        tree = self._features.get_tree(identity, tokens.device)
        if tree is None:
            tree = method.tree(tokens)
            self._features.put_tree(identity, tree)
        return tree

    def _compressed_rows(
        self, tokens: torch.Tensor, num_retained: int, video: VideoPixels
    ) -> CompressedTokens:
        if not video.keeps_every_frame:
            return self._compress_or_cut(tokens, num_retained, video.identity)
        method = self._compress
        if isinstance(method, AverageLinkage):
            tree = self._tree(method, tokens, video.identity)
            return keep_every_frame(
                lambda count: method.cut(tree, tokens, count), tokens, num_retained
            )
        return keep_every_frame(lambda count: method(tokens, count), tokens, num_retained)

    def _exactly(
        self, tokens: torch.Tensor, num_retained: int, video: VideoPixels
    ) -> CompressedTokens:
        """Return K rows; raise only if ranks could otherwise have different rows.

        An exception here ends the engine for all requests. So a failure falls back to evenly spaced
        tokens:

        - ValueError: the tokens are not finite, or beyond a limit. It depends on the tokens and K
          only, so with tensor parallelism every rank falls back.
        - Other errors, such as out of memory or a failed launch, may occur on one rank only. A
          single worker falls back. With tensor parallelism the error is raised: ranks with
          different rows would answer wrongly without notice, and agreeing on a fallback would cost
          a collective for each video.

        A CUDA error that leaves the device unusable ends the fallback too.
        """
        flat = tokens.flatten(0, 1)
        assignment = torch.arange(len(flat), device=flat.device)
        if num_retained == len(flat):
            return CompressedTokens(flat, assignment)
        if num_retained > len(flat):
            # The processor checks this for each request, so no client can cause it.
            logger.error(
                "a video was to keep %d tokens but has %d; the last is repeated",
                num_retained,
                len(flat),
            )
            repeated = flat[-1:].expand(num_retained - len(flat), -1)
            return CompressedTokens(torch.cat([flat, repeated]), assignment)
        try:
            with self.stage("compress", tokens.device):
                compressed = self._compressed_rows(tokens, num_retained, video)
        except ValueError as error:
            logger.error("%s failed (%s); %d tokens kept evenly", self.method, error, num_retained)
            return select_evenly(tokens, num_retained)
        except Exception:
            if self._is_shared():
                raise
            logger.exception("%s failed; %d tokens kept evenly", self.method, num_retained)
            return select_evenly(tokens, num_retained)
        self._record_threshold(compressed)
        return compressed

    @staticmethod
    @cache
    def _is_shared() -> bool:
        """Return whether several workers compress the same video."""
        return model_parallel_is_initialized() and get_tensor_model_parallel_world_size() > 1

    def _record_threshold(self, compressed: CompressedTokens) -> None:
        if not self._is_recording():
            return
        if compressed.similarity_threshold is not None:
            record_threshold(compressed.similarity_threshold)
        elif compressed.threshold_on_device is not None:
            THRESHOLDS.read(compressed.threshold_on_device)
