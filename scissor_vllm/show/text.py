"""Captions of a picture."""

from __future__ import annotations

from scissor_vllm.show.picture import Grouping, Picture


def caption(picture: Picture, grouping: Grouping) -> list[str]:
    """Return the lines of a picture's caption."""
    num_frames, per_frame = len(picture.frames), picture.rows * picture.columns
    threshold = grouping.similarity_threshold
    shown_threshold = "none" if threshold is None else f"{threshold:.4f}"
    return [
        f"{picture.name}: {grouping.method}, retention ratio {grouping.retention_ratio:g}",
        f"K = {grouping.num_retained} kept of T*P = {num_frames} x {per_frame} = "
        f"{picture.num_tokens} tokens; similarity threshold: {shown_threshold}",
        "one color: merged into one kept token, in every frame; dot: the member nearest to it",
    ]


def strip_caption(grouping: Grouping, most: int) -> str:
    """Return the caption of the strip."""
    num_rows = grouping.num_retained
    which = f"all {num_rows}" if num_rows <= most else f"{most} of {num_rows}, evenly sampled,"
    return f"kept tokens ({which} top to bottom by first frame) over the frames (left to right)"
