"""Maps every weight to a new name, a reason for omission, or an error.

The expected weights come from models built on the meta device. The original's language model has
Qwen2's names and its tower SigLIP's, each below a prefix.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scissor_vllm.convert.config import ConversionError

TOWER = "model.vision_tower.vision_tower.vision_model."
IMAGE_NEWLINE = "model.image_newline"
INPUT_EMBEDDING, OUTPUT_EMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
_PROJECTOR = {"model.mm_projector.0.": "linear_1.", "model.mm_projector.2.": "linear_2."}
_OPTIONAL = ("post_layernorm.",)
"""Parts of the tower that transformers has and no computation uses."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A weight of the new checkpoint."""

    name: str
    shape: Shape
    is_optional: bool = False


@dataclass
class Plan:
    """The mapping of a checkpoint's weights."""

    names: dict[str, str]
    """Old name to new."""
    left_out: dict[str, str]
    """Old name to reason."""


def targets(config: Any, has_newline: bool) -> dict[str, Target]:
    """Return the weights of a LlavaOnevisionConfig by original name."""
    from transformers import Qwen2ForCausalLM, SiglipVisionModel

    with torch.device("meta"):
        tower = SiglipVisionModel(config.vision_config).state_dict()
        language = Qwen2ForCausalLM(config.text_config).state_dict()
    targets_by_name = {}
    for name, weight in tower.items():
        # transformers 5 has no such level, 4 has.
        short = name.removeprefix("vision_model.")
        is_optional = short.startswith(_OPTIONAL)
        new = f"vision_tower.vision_model.{short}"
        targets_by_name[TOWER + short] = Target(new, tuple(weight.shape), is_optional)
    width, inner = config.text_config.hidden_size, config.vision_config.hidden_size
    for (old, new), columns in zip(_PROJECTOR.items(), (inner, width), strict=True):
        targets_by_name[f"{old}weight"] = Target(
            f"multi_modal_projector.{new}weight", (width, columns)
        )
        targets_by_name[f"{old}bias"] = Target(f"multi_modal_projector.{new}bias", (width,))
    if has_newline:
        targets_by_name[IMAGE_NEWLINE] = Target("image_newline", (width,))
    for name, weight in language.items():
        if not (config.text_config.tie_word_embeddings and name == OUTPUT_EMBEDDING):
            targets_by_name[name] = Target(f"language_model.{name}", tuple(weight.shape))
    return targets_by_name


def plan(shapes: Mapping[str, Shape], config: Any) -> Plan:
    """Return the mapping of every weight.

    Args:
        shapes: shapes of all weights by original name.
        config: the LlavaOnevisionConfig.

    Raises:
        ConversionError: weights are unknown, missing or of another shape; the message names all.
    """
    wanted = targets(config, has_newline=IMAGE_NEWLINE in shapes)
    made = Plan({}, {})
    unknown, misshapen = [], []
    for name, shape in shapes.items():
        target = wanted.get(name)
        if target is None:
            reason = _reason_to_leave_out(name, config)
            if reason is None:
                unknown.append(name)
            else:
                made.left_out[name] = reason
        elif shape != target.shape:
            misshapen.append(f"{name} is {shape}, config.json says {target.shape}")
        else:
            made.names[name] = target.name
    missing = [
        name for name, target in wanted.items() if name not in shapes and not target.is_optional
    ]
    problems = [
        _listed("fit nowhere in LLaVA-OneVision", unknown),
        _listed("are missing", missing),
        _listed("have another shape", misshapen),
    ]
    if any(problems):
        raise ConversionError(
            "this is no checkpoint of the model that its config.json describes" + "".join(problems)
        )
    return made


def original_name(name: str) -> str | None:
    """Return the original name of a SigLIP repository's weight, None for the text model."""
    if name.startswith(("text_model.", "logit_")):
        return None
    return TOWER + name.removeprefix("vision_model.")


def _reason_to_leave_out(name: str, config: Any) -> str | None:
    if name == OUTPUT_EMBEDDING:
        return "tied to the input embedding"
    if name.endswith(".rotary_emb.inv_freq") or name == f"{TOWER}embeddings.position_ids":
        return "computed, not learned"
    if name.startswith(f"{TOWER}head."):
        return "the pooling head: features are taken before it"
    if name.startswith(f"{TOWER}encoder.layers.{config.vision_config.num_hidden_layers}."):
        return "the tower's last layer: features are taken before it"
    return None


def _listed(problem: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"\n{len(names)} weights {problem}:\n  " + "\n  ".join(names) if names else ""
