"""Computes a checkpoint's video tokens without a server, by transformers' tower and projector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoVideoProcessor
from transformers.utils import logging

from scissor_vllm.models import MODELS

_FRAMES_AT_ONCE = 8


class EncoderError(RuntimeError):
    """The model cannot be loaded or is not supported; the message names the remedy."""


@dataclass(frozen=True)
class VideoTokens:
    """Output of the tower and projector for a video."""

    tokens: torch.Tensor
    """(T, P, D) float32."""
    rows: int
    columns: int
    """P = rows * columns, in row-major order."""


class Encoder:
    """The vision tower and the projector of a checkpoint, on the CPU in float32.

    transformers' model is built with no layers in its language model, so those weights are not
    read. The projector needs only the language model's width.
    """

    def __init__(self, model: str) -> None:
        """Take a folder or a model of the hub. Weights are read with the first video.

        Raises:
            EncoderError: the model cannot be loaded or is not supported.
        """
        self._name = model
        with _loading(model):
            self._config = AutoConfig.from_pretrained(model)
        self._check(model, self._config)
        with _loading(model):
            self._processor = AutoVideoProcessor.from_pretrained(model)

    @property
    def video_processor(self) -> str:
        """Name of the video processor's class, which a server samples frames for."""
        return type(self._processor).__name__

    @cached_property
    def _model(self) -> Any:
        text = self._config.get_text_config()
        text.num_hidden_layers = 0
        if getattr(text, "layer_types", None):
            text.layer_types = []
        with _loading(self._name):
            return AutoModel.from_pretrained(
                self._name, config=self._config, dtype=torch.float32
            ).eval()

    @staticmethod
    def _check(model: str, config: Any) -> None:
        named = config.architectures or [type(config).__name__]
        if not set(named) & set(MODELS):
            raise EncoderError(
                f"a model must be one of {', '.join(MODELS)}, got {', '.join(named)} in {model!r}: "
                "videos are compressed for these only"
            )

    @torch.inference_mode()
    def encode(self, frames: npt.NDArray[np.uint8]) -> VideoTokens:
        """Return the tokens of frames, uint8 RGB (num_frames, H, W, 3), a few frames at a time.

        Raises:
            EncoderError: the weights cannot be loaded.
        """
        # Cached frames are read-only, and torch warns about that.
        pixels = torch.from_numpy(np.require(frames, requirements="W")).permute(0, 3, 1, 2)
        prepared = self._processor(videos=[pixels], do_sample_frames=False, return_tensors="pt")
        if "video_grid_thw" in prepared:
            return self._encode_grid(**prepared)
        (video,) = prepared["pixel_values_videos"]
        vision = self._config.vision_config
        # The model pools half of the patches of a side, rounded up.
        side = -(-(vision.image_size // vision.patch_size) // 2)
        parts = []
        for block in _few_at_once(video):
            rows = self._model.get_video_features(block[None]).pooler_output[0]
            # The newline after a video is not compressed.
            parts.append(rows[: len(block) * side * side].view(len(block), side * side, -1))
        return VideoTokens(torch.cat(parts), side, side)

    def _encode_grid(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **_: Any
    ) -> VideoTokens:
        """Return the tokens of patches; the tower attends within a temporal patch."""
        ((num_frames, height, width),) = video_grid_thw.tolist()
        merge = self._config.vision_config.spatial_merge_size
        parts = []
        for block in _few_at_once(pixel_values_videos.view(num_frames, height * width, -1)):
            grid = torch.tensor([[len(block), height, width]])
            features = self._model.get_video_features(block.flatten(0, 1), video_grid_thw=grid)
            (rows,) = features.pooler_output
            parts.append(rows.view(len(block), height * width // merge**2, -1))
        return VideoTokens(torch.cat(parts), height // merge, width // merge)


def _few_at_once(frames: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield blocks of frames, with a progress bar on a terminal."""
    parts = frames.split(_FRAMES_AT_ONCE)
    yield from tqdm(parts, "vision tower", unit=f" x {_FRAMES_AT_ONCE} frames", disable=None)


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """Name a model that fails to load, and silence transformers' list of unused weights."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise EncoderError(
            "--model must be a folder or a name on the hub that transformers loads (`scissor-vllm "
            f"convert` makes one of LLaVA's original checkpoints), got {model!r}: {error}"
        ) from error
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
