"""A request's videos as vLLM parsed them: frames, with metadata from the client's file."""

from __future__ import annotations

from typing import Any

from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems

from scissor_vllm.video_fields import IMAGES


def frames_of(video: Any) -> VideoProcessorItems:
    """Return a video's frames without its metadata.

    vLLM 0.32 and 0.33 count a pair of frames and metadata as two frames.
    """
    return VideoProcessorItems([video[0] if isinstance(video, tuple) else video])


def why_unreadable(videos: VideoProcessorItems) -> str | None:
    """Return why a video processor may fail on the videos' metadata, None if all is well."""
    for index, video in enumerate(videos.get_all()):
        if not isinstance(video, tuple):
            continue
        num_frames, metadata = frames_of(video).get_num_frames(0), video[1]
        indices, rate = metadata.get("frames_indices"), metadata.get("fps")
        if indices is not None and len(indices) != num_frames:
            return (
                f"video {index} has {num_frames} frames, but its metadata names {len(indices)}: "
                "send a file whose header agrees with its frames"
            )
        if not rate or rate < 0:
            return (
                f"video {index} must have a positive frame rate, got {rate}: send a file that "
                "tells its frame rate"
            )
    return None


def pixels_of_videos(items: MultiModalDataItems) -> VideoProcessorItems | None:
    """Return a request's videos, None if it has no video or sends embeddings instead."""
    videos = items.get("video")
    return videos if isinstance(videos, VideoProcessorItems) else None


def num_images_of(videos: VideoProcessorItems) -> list[int]:
    """Return the number of images of each video that is a run of images, 0 for other videos."""
    known = videos.metadata if isinstance(videos.metadata, list) else [None] * len(videos)
    return [
        metadata["total_num_frames"] if metadata and metadata.get("video_backend") == IMAGES else 0
        for metadata in known
    ]
