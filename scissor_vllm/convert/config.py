"""Converts the original's ``config.json`` to the config that vLLM loads.

The original's computation, from its public configs and the conversion in transformers:

- the vision tower is SigLIP without its last encoder layer, final norm and head, whatever
  ``mm_vision_select_layer`` says;
- the projector is two linear layers with GELU between them;
- a video's frames are pooled bilinearly to half their height and width, and one newline follows
  where the checkpoint has one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURE = "LlavaQwenForCausalLM"

_TOWERS = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}
"""Shapes by the last part of ``mm_vision_tower``. Weights do not determine heads and pixels."""

_TOWER_SHAPES = (*_TOWERS["siglip-so400m-patch14-384"], "layer_norm_eps", "hidden_act")

_SERVED: dict[str, tuple[object, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None, "identity"),
    "mm_spatial_pool_mode": (None, "bilinear"),
    "mm_spatial_pool_stride": (None, 2),
    "mm_vision_select_feature": (None, "patch"),
    "mm_use_im_start_end": (None, False),
    "add_faster_video": (None, False),
}
"""Settings for which vLLM's model computes the same; None stands for a missing key."""

_MAX_CAUSE = 200
"""Most characters of another library's message in ours."""

_NEWLINES: dict[object, bool] = {None: True, "one_token": True, "no_token": False}
"""Whether a newline ends a video, by ``mm_newline_position``."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted: the rule, the value and the remedy."""


@dataclass(frozen=True)
class Newlines:
    """Use of the model's newline vector."""

    has_weight: bool
    """Without one only videos are served, because vLLM ends each line of an image with a
    newline."""
    ends_video: bool


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object.

    Raises:
        ConversionError: there is no such file, or it has no JSON object.
    """
    if not path.is_file():
        raise ConversionError(f"{path} is missing: name the folder of a downloaded checkpoint")
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConversionError(f"{path} must hold a JSON object, got a {kind}: download it again")
    return content


@contextmanager
def reading(path: Path, remedy: str = "download it again") -> Iterator[None]:
    """Raise what the block raises as a ConversionError of one sentence.

    The libraries that parse a checkpoint's files raise exceptions of many types, plain
    ``Exception`` among them.

    Args:
        path: the file or folder that the block reads.
        remedy: what to do about it.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        (cause, *_) = str(error).strip().splitlines() or [""]
        raise ConversionError(
            f"{path} cannot be read ({type(error).__name__}: {cause[:_MAX_CAUSE]}): {remedy}"
        ) from error


def check_served(original: Mapping[str, Any]) -> None:
    """Raise ConversionError with every setting for which vLLM would compute something else."""
    architectures = original.get("architectures") or []
    if architectures != [ARCHITECTURE]:
        raise ConversionError(
            f"config.json must say architectures: [{ARCHITECTURE!r}], got {architectures}: only "
            "original-format LLaVA-OneVision checkpoints are converted"
        )
    wrong = [
        f"{key} is {original.get(key)!r} and must be {' or '.join(map(repr, values))}"
        for key, values in _SERVED.items()
        if original.get(key) not in values
    ]
    if wrong:
        raise ConversionError(
            f"vLLM's LLaVA-OneVision computes otherwise than this checkpoint: {'; '.join(wrong)}"
        )


def newlines_of(original: Mapping[str, Any], has_weight: bool) -> Newlines:
    """Return the use of newlines.

    Raises:
        ConversionError: a video has more newlines than vLLM's model supports.
    """
    if not has_weight:
        return Newlines(has_weight=False, ends_video=False)
    position = original.get("mm_newline_position")
    if position not in _NEWLINES:
        raise ConversionError(
            f"mm_newline_position is {position!r}, but vLLM's LLaVA-OneVision knows one newline "
            "after a video (one_token) or none (no_token)"
        )
    return Newlines(has_weight=True, ends_video=_NEWLINES[position])


def tower_config(original: Mapping[str, Any], vision_tower: Path | None) -> dict[str, Any]:
    """Return the shapes of the whole SigLIP tower, its last layer included.

    Args:
        original: the checkpoint's config.
        vision_tower: folder of the SigLIP repository, None to go by its name.

    Raises:
        ConversionError: the name is unknown and no folder is given, or the tower is not SigLIP.
    """
    name = str(original.get("mm_vision_tower") or original.get("vision_tower"))
    if vision_tower is None:
        shapes = _TOWERS.get(name.rstrip("/").rpartition("/")[2])
        if shapes is None:
            raise ConversionError(
                f"the shapes of mm_vision_tower {name!r} are not known: download that repository "
                "and name its folder with --vision-tower"
            )
        return shapes
    config = read_json(vision_tower / "config.json")
    config = config.get("vision_config", config)
    if not isinstance(config, dict) or config.get("model_type") != "siglip_vision_model":
        raise ConversionError(
            f"the vision tower must be a SigLIP, {vision_tower}/config.json says otherwise by its "
            f"model_type: name the folder of {name!r}"
        )
    from transformers import SiglipVisionConfig

    with reading(vision_tower / "config.json"):
        whole = SiglipVisionConfig(**config)
    return {key: getattr(whole, key) for key in _TOWER_SHAPES}


def text_config(original: Mapping[str, Any]) -> Any:
    """Return the language model's Qwen2Config."""
    from transformers import Qwen2Config

    known = {*Qwen2Config().to_dict(), "rope_theta", "rope_scaling", "torch_dtype"}
    excluded = {"model_type", "architectures", "transformers_version"}
    kept = {key: value for key, value in original.items() if key in known - excluded}
    return Qwen2Config(**kept)


def converted_config(
    original: Mapping[str, Any],
    tower: Mapping[str, Any],
    newlines: Newlines,
    token_ids: tuple[int, int],
) -> Any:
    """Return the LlavaOnevisionConfig to save.

    ``use_image_newline_parameter`` and ``mm_newline_position`` are what
    ``scissor_vllm.models.llava_onevision`` reads; transformers and stock vLLM read neither.

    Args:
        original: the checkpoint's config.
        tower: see :func:`tower_config`.
        newlines: see :func:`newlines_of`.
        token_ids: of ``<image>`` and ``<video>``.
    """
    from transformers import LlavaOnevisionConfig, SiglipVisionConfig

    text = text_config(original)
    # With index -1 vLLM and transformers both compute the last of 26 layers.
    used = {**tower, "num_hidden_layers": tower["num_hidden_layers"] - 1}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**used, vision_use_head=False),
        text_config=text,
        image_token_index=token_ids[0],
        video_token_index=token_ids[1],
        image_grid_pinpoints=_pinpoints(original, tower["image_size"]),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=_aspect_ratio(original),
        tie_word_embeddings=text.tie_word_embeddings,
        use_image_newline_parameter=newlines.has_weight,
        mm_newline_position="one_token" if newlines.ends_video else "no_token",
    )
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    config.dtype = text.dtype
    return config


def _aspect_ratio(original: Mapping[str, Any]) -> str:
    """Return the image aspect ratio setting: transformers and vLLM know only ``anyres_max_N``."""
    ratio = str(original.get("image_aspect_ratio"))
    return ratio if re.fullmatch(r"anyres_max_\d+", ratio) else "anyres_max_9"


def _pinpoints(original: Mapping[str, Any], side: int) -> list[list[int]]:
    """Return the image grid pinpoints in pixels.

    The original writes them as a list, or in units of the tower's side as ``(1x1),...,(6x6)``.
    """
    pinpoints = original.get("image_grid_pinpoints")
    if isinstance(pinpoints, str):
        cells = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if not cells:
            raise ConversionError(
                f"image_grid_pinpoints must be a list of sizes or (1x1),...,(6x6), got "
                f"{pinpoints!r}"
            )
        if "..." in pinpoints:
            (first_row, first_column), (last_row, last_column) = cells[0], cells[-1]
            cells = [
                (row, column)
                for row in range(first_row, last_row + 1)
                for column in range(first_column, last_column + 1)
            ]
        return [[side * rows, side * columns] for rows, columns in cells]
    if pinpoints:
        return [list(size) for size in pinpoints]
    return [[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)]
