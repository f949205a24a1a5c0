"""Worker extension of the web page: the assignment of a video's tokens by the served model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import get_pp_group, model_parallel_is_initialized
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from scissor_vllm.compression.members import representative_members

if TYPE_CHECKING:
    from scissor_vllm.compression import CompressedTokens

METHOD = "scissor_groups"
"""Method name for the engine's ``collective_rpc``."""


@dataclass(frozen=True)
class Groups:
    """Assignment of one video's N tokens, serialized between processes."""

    assignment: bytes
    """(N,) int32: row of the kept token, -1 for none."""
    representatives: bytes
    """(K,) int32."""
    similarity_threshold: float | None

    @classmethod
    def of_reply(cls, replies: Sequence[Any]) -> Groups:
        """Return the groups of an engine's replies; workers without a tower reply None."""
        return cls(*next(reply for reply in replies if reply is not None))


def encoded(item: MultiModalKwargsItem) -> list[bytes]:
    """Return a video's prepared data as bytes by vLLM's encoder."""
    return [bytes(part) for part in MsgpackEncoder().encode(item)]


class PictureWorker:
    """Mixin that vLLM adds to each worker."""

    def scissor_groups(self, parts: list[bytes]) -> list[Any] | None:
        """Return the fields of ``Groups`` of a video; None where there is no tower.

        The tower, the method and the feature cache are those of requests. The call runs between two
        engine steps, and takes as long as a step that encodes this video.
        """
        if model_parallel_is_initialized() and not get_pp_group().is_first_rank:
            return None
        item = MsgpackDecoder(MultiModalKwargsItem).decode(parts)
        model = self.get_model()  # type: ignore[attr-defined]
        device = self.device  # type: ignore[attr-defined]
        replies: list[list[Any]] = []

        def watch(tokens: torch.Tensor, compressed: CompressedTokens) -> None:
            members = representative_members(tokens, compressed)
            rows = [compressed.assignment, members]
            replies.append([*(_as_bytes(tensor) for tensor in rows), _threshold(compressed)])

        ((_, _, fields),) = group_and_batch_mm_kwargs([("video", item)], device=device)
        with torch.inference_mode(), model.video_compression.watched(watch):
            model.embed_multimodal(**fields)
        (groups,) = replies
        return groups


def _threshold(compressed: CompressedTokens) -> float | None:
    if compressed.threshold_on_device is None:
        return compressed.similarity_threshold
    threshold = compressed.threshold_on_device.item()
    return None if math.isnan(threshold) else threshold


def _as_bytes(rows: torch.Tensor) -> bytes:
    return rows.cpu().numpy().astype(np.int32).tobytes()
