"""Differences between the supported versions of vLLM, and reaches beyond its public interface.

Each entry states its reason and the condition for its removal.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import vllm.connections
import vllm.multimodal.media.base
from vllm import ir
from vllm.config import ModelConfig, VllmConfig
from vllm.config.multimodal import MultiModalConfig
from vllm.multimodal.utils import copy_mm_embedding_modality
from vllm.platforms import current_platform

logger = logging.getLogger(f"vllm.{__name__}")

_CUDA_KERNELS = "vllm_c"
"""vLLM's name of its own CUDA kernels, among the implementations of an operation."""


def cli_env_setup() -> None:
    """Set the environment that vLLM's own command sets before it starts processes.

    vLLM 0.33 moved the function. Remove the second import with support for 0.32.
    """
    try:
        from vllm.entrypoints.common.startup import cli_env_setup as setup
    except ImportError:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup as setup
    setup()


def num_api_servers(vllm_config: VllmConfig) -> int:
    """Return how many API servers share the host, this process among them.

    vLLM keeps the number in a private field of an API server's config. It can go when the number is
    public.
    """
    return int(getattr(vllm_config.parallel_config, "_api_process_count", 1))


class PositionsFromModel(MultiModalConfig):
    """vLLM's config for a model whose embeddings carry positions, at any pruning rate."""

    def is_multimodal_pruning_enabled(self) -> bool:
        """Return True: the model runners ask the model for positions after encoding."""
        return True


def ask_model_for_positions(model_config: ModelConfig) -> None:
    """Make the model runner call the model's ``recompute_mrope_positions``.

    This is vLLM's interface (``SupportsMultiModalPruning``) on both runners. vLLM 0.32 and 0.33 use
    it only if the server-wide ``--video-pruning-rate`` is set, which would also prune. V1's
    ``load_model`` and V2's ``maybe_create_mm_pruner`` read the config after the model is built. A
    model calls this in its constructor, so it affects that model in its worker only. Remove it when
    a runner asks the model.
    """
    model_config.multimodal_config = _with_positions(model_config.get_multimodal_config())
    if not current_platform.is_cpu():
        from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

        place_without_waiting(MultiModalPruner)
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    ask_where_rows_carry_positions(GPUModelRunner)


def _with_positions(config: MultiModalConfig) -> PositionsFromModel:
    """Return a config with the same values, without running the validators of a copy."""
    same = PositionsFromModel.__new__(PositionsFromModel)
    same.__dict__.update(vars(config))
    return same


def place_without_waiting(pruner: Any) -> None:
    """Make V2's pruner write the positions that our rows carry on the device.

    It would ask the model for the positions of every request with an image or a video, in host
    memory, and so wait for the tower in each step with a video. Remove it when vLLM takes positions
    on the device.

    Args:
        pruner: ``MultiModalPruner``.
    """
    recompute = pruner.recompute
    if hasattr(recompute, "__wrapped__"):
        return

    @wraps(recompute)
    def place(self: Any, mm_embeds: list[torch.Tensor], batch: Any, states: Any) -> Any:
        if not hasattr(self.model, "place_carried"):
            return recompute(self, mm_embeds, batch, states)
        if not carry_positions(self.model, mm_embeds):
            return mm_embeds
        cleaned: list[torch.Tensor] = []
        for request, state, length, num_computed, num_tokens in zip(
            batch.req_ids,
            batch.idx_mapping_np.tolist(),
            batch.prefill_len_np.tolist(),
            batch.num_computed_prefill_tokens_np.tolist(),
            batch.num_scheduled_tokens.tolist(),
            strict=False,
        ):
            values = self.model.place_carried(
                self.rope_state.read_prefill_positions(state, length),
                self.encoder_cache.mm_features[request],
                mm_embeds[len(cleaned) :],
                num_computed,
                num_tokens,
            )
            rows = mm_embeds[len(cleaned) : len(cleaned) + len(values)]
            cleaned.extend(map(copy_mm_embedding_modality, rows, values))
        return cleaned

    pruner.recompute = place


def ask_where_rows_carry_positions(runner: Any) -> None:
    """Make V1's runner ask the model for positions only in steps whose rows carry positions.

    The runner's attribute is set once for all steps. Each step would then recompute the positions
    of every request, copy them to the device, and encode a batch's videos one by one. On a CPU
    ``load_model`` does not set the attribute, so vLLM's own pruning fails there at the first video.
    Remove it when vLLM asks the model which rows carry positions.

    Args:
        runner: ``GPUModelRunner``, the base class of the CPU's runner.
    """
    gather = runner._gather_mm_embeddings
    if hasattr(gather, "__wrapped__"):
        return

    @wraps(gather)
    def gather_carried(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.model_config.multimodal_config, PositionsFromModel):
            # Another model in this process.
            return gather(self, *args, **kwargs)
        self.rows_carry_positions = carry_positions(self.get_model(), self.encoder_cache.values())
        try:
            return gather(self, *args, **kwargs)
        finally:
            self.rows_carry_positions = False

    def is_enabled(self: Any) -> bool:
        if isinstance(self.model_config.multimodal_config, PositionsFromModel):
            return getattr(self, "rows_carry_positions", False)
        return bool(self.__dict__.get("prunes", False))

    def enable(self: Any, value: bool) -> None:
        self.__dict__["prunes"] = value

    runner._gather_mm_embeddings = gather_carried
    runner.is_multimodal_pruning_enabled = property(is_enabled, enable)


def forget_with_encoder_cache() -> None:
    """Have both model runners tell a model's ``forget_encoded`` when they drop what it encoded.

    vLLM resets its encoder cache after every update of weights. Not all of them, such as weight
    transfers, go through ``load_weights``, and a model has no part in the reset. A model calls this
    in its constructor. Remove it when vLLM tells the model of an update.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    tell_model_of_reset(GPUModelRunner)
    if not current_platform.is_cpu():
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2

        tell_model_of_reset(GPUModelRunnerV2)


def tell_model_of_reset(runner: Any) -> None:
    """Make a runner call its model's ``forget_encoded``, if it has one, after a reset.

    Args:
        runner: a class ``GPUModelRunner``; the CPU's is V1's subclass.
    """
    reset = runner.reset_encoder_cache
    if hasattr(reset, "__wrapped__"):
        return

    @wraps(reset)
    def reset_and_forget(self: Any) -> None:
        reset(self)
        forget = getattr(self.get_model(), "forget_encoded", None)
        if forget is not None:
            forget()

    runner.reset_encoder_cache = reset_and_forget


def carry_positions(model: Any, rows: Iterable[torch.Tensor]) -> bool:
    """Return whether any encoder output is wider than a row, so carries positions."""
    return any(output.shape[-1] != model.row_width for output in rows)


def wait_before_shutdown(
    engine_client: Any, in_flight: Any, on_failure: Callable[[], None] = lambda: None
) -> None:
    """Have an engine's client wait for the requests in flight before it shuts down.

    After SIGTERM, vLLM 0.32 and 0.33 call ``EngineClient.shutdown`` in a thread while the server
    still answers. It ends the renderer, and with several API servers the connection to the engine,
    before the engine has drained. It can go when vLLM counts a request from its arrival on.

    A server whose engine has failed is shut down too, and vLLM's command then ends with status 0.
    ``on_failure`` can go when it does not.

    Args:
        engine_client: an API server's.
        in_flight: :class:`scissor_vllm.frontend.draining.InFlight` of the same API server.
        on_failure: called at the shutdown of an engine that has failed.
    """
    shutdown = engine_client.shutdown
    has_begun = False

    @wraps(shutdown)
    def drain_and_shutdown(timeout: float | None = None) -> None:
        nonlocal has_begun
        # A client that was shut down has no engine either.
        if not has_begun and engine_client.errored:
            on_failure()
        has_begun = True
        left = in_flight.drain(0 if _is_on_event_loop() else timeout or 0)
        try:
            shutdown(timeout=left if timeout else timeout)
        finally:
            in_flight.cut()

    engine_client.shutdown = drain_and_shutdown


def _is_on_event_loop() -> bool:
    """Return whether requests are answered by this thread: it cannot wait for them.

    So it is where the engine has failed, and at the second call.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def max_engine_tokens(engine_client: Any) -> int | None:
    """Return the most tokens of an image or a video that the engine takes, None if not known.

    vLLM checks them where the engine's client takes a prompt. A stream has begun by then, so its
    client gets 200 and an error in the stream. It can go when vLLM checks before.
    """
    input_processor = getattr(engine_client, "input_processor", None)
    # vLLM has 0 for a model without media.
    return getattr(input_processor, "mm_encoder_cache_size", None) or None


def pending_prompts(engine_client: Any) -> tuple[int, int]:
    """Return how many of an API server's prompts have no first token yet, and their tokens.

    vLLM's ``get_num_queued_tokens`` gives the tokens alone. It can go when vLLM gives both.
    """
    states = list(engine_client.output_processor.request_states.values())
    lengths = [state.prompt_len for state in states if state.is_prefilling]
    return len(lengths), sum(lengths)


def watch_first_tokens(engine_client: Any, record: Callable[[int, int, float], None]) -> None:
    """Have each step of an engine tell how many prompts got their first token in it.

    Beside vLLM's own loggers of statistics. Its entry point ``vllm.stat_logger_plugins`` makes one
    for every engine, offline too, and gives no access to it. It can go when the engine's client
    takes a logger.

    Args:
        engine_client: an API server's.
        record: takes their number, how many tokens they have together, and the seconds since the
            first of them arrived. What it raises is logged.

    Raises:
        ValueError: the operator switched statistics off.
    """
    manager = engine_client.logger_manager
    if manager is None:
        raise ValueError(
            "--auto-retention-ratio needs the engine's statistics: leave --disable-log-stats out"
        )
    manager.stat_loggers.append(_first_token_logger(record))


def _first_token_logger(record: Callable[[int, int, float], None]) -> Any:
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    class FirstTokens(AggregateStatLoggerBase):
        def __init__(self) -> None:
            pass

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if iteration_stats is None or not iteration_stats.time_to_first_tokens_iter:
                return
            latencies = iteration_stats.time_to_first_tokens_iter
            try:
                record(len(latencies), iteration_stats.num_prompt_tokens, max(latencies))
            except Exception:
                # It would end the task that hands the engine's outputs to the requests.
                logger.exception("scissor_vllm: first tokens were not counted for auto ratios")

        def log_engine_initialized(self) -> None:
            pass

    return FirstTokens()


def media_budgets() -> dict[str, Any]:
    """Return arguments of a media connector that bound the media of one request.

    vLLM 0.32 has no such bounds. The lookup can become imports when 0.32 is no longer supported.
    """
    decoded = getattr(vllm.multimodal.media.base, "MediaDecodedBudget", None)
    download = getattr(vllm.connections, "MediaRequestDownloadBudget", None)
    if decoded is None or download is None:
        return {}
    return {"decoded_budget": decoded(), "download_budget": download()}


@contextmanager
def fused_norms() -> Iterator[None]:
    """Make RMS norms run vLLM's CUDA kernels in the context, also in a server that compiles.

    With compilation on, vLLM has them run several PyTorch operations, which Inductor fuses. A tower
    is not compiled unless ``compile_mm_encoder`` is set, so it runs them one by one. On an H200
    they take 30 of 105 ms of Qwen2.5-VL's tower. An operator's choice of kernels stays.

    Without CUDA nothing changes. It can go when vLLM chooses kernels for each module.
    """
    with ExitStack() as changed:
        for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
            if op.get_priority() == ["native"] and _CUDA_KERNELS in op.supported_providers():
                changed.enter_context(op.set_priority([_CUDA_KERNELS, "native"]))
        yield


def frames_attention(
    attention: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    most_queries: int,
    most_keys: int,
) -> torch.Tensor:
    """Return the attention of each frame's queries to that frame's keys.

    A window of a frame is as good as a frame.

    vLLM's ``MMEncoderAttention`` takes as many queries as keys. This calls the kernel that the
    module has chosen where that is flash attention, and torch's otherwise. It can go when the
    module takes lengths of queries and of keys.

    Args:
        attention: the ``MMEncoderAttention``.
        queries: (M, heads, head size), frame after frame.
        keys: (T*P, heads, head size).
        values: like the keys.
        query_ends: where each frame's queries begin and end, int32 (T + 1,), on the device.
        key_ends: the same for keys.
        most_queries: no frame has more.
        most_keys: likewise.

    Returns:
        like the queries; on a GPU rows behind the last frame's have no meaning.
    """
    if queries.is_cuda and attention.is_flash_attn_backend:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        version = attention._fa_version
        out: torch.Tensor = flash_attn_varlen_func(
            queries,
            keys,
            values,
            cu_seqlens_q=query_ends,
            cu_seqlens_k=key_ends,
            max_seqlen_q=most_queries,
            max_seqlen_k=most_keys,
            dropout_p=0.0,
            causal=False,
            softmax_scale=attention.scale,
            # By default version 3 splits keys where one frame would not fill the GPU.
            **({} if version is None else {"fa_version": version, "num_splits": 1}),
        )
        return out
    num_queries, num_keys = (ends.diff().tolist() for ends in (query_ends, key_ends))
    frames = zip(
        queries.split(num_queries), keys.split(num_keys), values.split(num_keys), strict=True
    )
    attended = []
    for frame in frames:
        if len(frame[0]) == 0:
            continue
        asked, keys, values = (part.transpose(0, 1)[None] for part in frame)
        answers = F.scaled_dot_product_attention(asked, keys, values, scale=attention.scale)
        attended.append(answers[0].transpose(0, 1))
    return torch.cat(attended)
