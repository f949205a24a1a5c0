"""A video's placeholders in a prompt, with the counts that the request's report needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.multimodal.processing.processor import PromptUpdateDetails

from scissor_vllm.retention import RetentionReport


@dataclass
class VideoPlaceholders(PromptUpdateDetails):
    """A video's placeholders and counts; vLLM caches them with the video."""

    num_tokens: int = 0
    """N."""
    num_retained: int = 0
    """K."""
    patches: tuple[int, int] | None = None
    """Number of patches and of computed patches, None if the tower merges none."""


def fill_report(
    report: RetentionReport, ratio: float, prompt_updates: Mapping[str, Sequence[Sequence[Any]]]
) -> None:
    """Add the counts of a request's videos to its report.

    Args:
        report: of the request.
        ratio: in force.
        prompt_updates: vLLM's, by modality: a list of updates for each item.
    """
    for updates in prompt_updates.get("video", ()):
        for content in (update.content for update in updates):
            if isinstance(content, VideoPlaceholders):
                report.add(ratio, content.num_tokens, content.num_retained)
                if content.patches is not None:
                    report.add_patches(*content.patches)
