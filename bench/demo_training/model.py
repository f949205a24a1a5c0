"""The demo model before it is trained: its sizes, tokenizer and fresh weights, and how it is saved.

LLaVA-OneVision's architecture: a SigLIP-shaped tower, a projector, a Qwen2-shaped language model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.model_shapes.llava_onevision import CHAT_TEMPLATE, build_config, save_processor
from bench.world.scene import FRAME_SIZE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
_TEMPLATE_WORDS = ("user", "assistant", "system")
_MATCH = 4.0
"""Logit that a fresh language model's attention gives to a token equal to the query's."""
_BEFORE = 17.5
"""Logit that a head for the previous token gives to it; four tokens on, a quarter less."""
_NUM_LAYERS_BEFORE = 2
_TOWER_PARTS = ("embeddings.", "encoder.", "post_layernorm.", "head.")


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths; the defaults are the demo's."""

    image_size: int = FRAME_SIZE
    patch_size: int = 8
    vision_width: int = 192
    vision_layers: int = 6
    vision_heads: int = 3
    vision_mlp: int = 768
    text_width: int = 256
    text_layers: int = 8
    text_heads: int = 4
    """Also the number of key heads: fewer would save little of so small a cache."""
    text_mlp: int = 704
    max_position: int = 32768

    @property
    def grid(self) -> int:
        """Tokens on one side of a frame after pooling, as LLaVA-OneVision pools."""
        return -(-self.image_size // self.patch_size // 2)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame after pooling."""
        return self.grid**2

    def changed(self, assignments: Iterable[str]) -> ModelSize:
        """Return a copy with fields set by texts like ``text_layers=2``.

        Raises:
            ValueError: no such field, or no integer.
        """
        changes = {}
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            if name not in self.__dataclass_fields__ or not value.isdecimal():
                fields = ", ".join(self.__dataclass_fields__)
                raise ValueError(
                    f"a size is set as FIELD=INTEGER with FIELD one of {fields}, got {assignment!r}"
                )
            changes[name] = int(value)
        return replace(self, **changes)

    def flops_per_clip(self, num_frames: int, num_question_tokens: int) -> float:
        """Return the floating-point operations of one training step for one clip.

        Forward and backward are counted as three forwards; attention as if nothing were masked.
        """
        patches = (self.image_size // self.patch_size) ** 2
        vision = 4 * self.vision_width**2 + 2 * self.vision_width * self.vision_mlp
        tower = num_frames * patches * self.vision_layers
        tower_flops = tower * (2 * vision + 4 * patches * self.vision_width)
        projector = self.vision_width * self.text_width + self.text_width**2
        text = 4 * self.text_width**2 + 3 * self.text_width * self.text_mlp
        length = num_frames * self.tokens_per_frame + num_question_tokens
        text_flops = length * self.text_layers * (2 * text + 4 * length * self.text_width)
        return 3.0 * (tower_flops + 2 * projector * num_frames * patches + text_flops)


def build_tokenizer(words: Iterable[str]) -> Any:
    """Return a tokenizer that has each word as one token and spells all else in bytes.

    A word is one token at a line's start and after a space, in lower case and capitalised. Every
    text comes back as it was when its tokens are decoded.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = sorted(split.alphabet())
    known = set(pieces)
    for form in _forms((*words, *_TEMPLATE_WORDS)):
        form_pieces = split.pre_tokenize_str(form)
        # What falls into several pieces, like "t-shirt", is known by its pieces.
        for piece, _ in form_pieces:
            if piece not in known:
                known.add(piece)
                pieces.append(piece)
    # Without merges a piece is one token if the vocabulary has it, else its bytes.
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _forms(words: Iterable[str]) -> Iterator[str]:
    for word in words:
        yield from (word, f" {word}", word.capitalize(), f" {word.capitalize()}")


def build_model(size: ModelSize, tokenizer: Any, seed: int) -> Any:
    """Return the model with fresh weights, float32, on the CPU."""
    from transformers import LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image_size,
        patch_size=size.patch_size,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=size.text_mlp,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.text_heads,
        max_position_embeddings=size.max_position,
        tie_word_embeddings=True,
        initializer_range=0.5 / size.text_width**0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    side = size.image_size
    pinpoints = [[side, side], [side, 2 * side], [2 * side, side]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(
            build_config(tokenizer, vision, text, pinpoints)
        )
        _scale_residual_branches(model)
        _begin_with_matching(model.model.language_model)
    return model


def _scale_residual_branches(model: Any) -> None:
    """Make each layer's contribution small at first, so that depth does not blow up the stream."""
    tower, text = vision_tower(model).encoder.layers, model.model.language_model.layers
    outputs = [(layer.self_attn.out_proj, layer.mlp.fc2) for layer in tower]
    outputs += [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in text]
    for depth, pair in ((len(tower), outputs[: len(tower)]), (len(text), outputs[len(tower) :])):
        for linears in pair:
            for linear in linears:
                linear.weight.data.mul_((2 * depth) ** -0.5)


def _begin_with_matching(text: Any) -> None:
    """Let attention begin by looking for what is alike, and one head by looking just before.

    Queries and keys begin alike (Trockman and Kolter 2023, "Mimetic initialization", do so for
    pictures), so that a word finds the video tokens that show it; with the head that looks at what
    stood before, it finds the letter of an option. From independent weights, letters were not
    learned in as many steps as all else took.
    """
    for layer in text.layers:
        attention = layer.self_attn
        query, key = attention.q_proj, attention.k_proj
        spread = (_MATCH / attention.head_dim**0.5) ** 0.5
        query.weight.data.normal_(std=spread * query.in_features**-0.5)
        key.weight.data.copy_(query.weight.data)
    for layer in text.layers[:_NUM_LAYERS_BEFORE]:
        _look_just_before(layer.self_attn, text.rotary_emb.inv_freq)


def _look_just_before(attention: Any, frequencies: torch.Tensor) -> None:
    """Make the first head prefer what stands one token before, whatever it is.

    Its constant query is its constant key turned back by one position.
    """
    size = attention.head_dim
    length = (_BEFORE * size**0.5 / len(frequencies)) ** 0.5
    query, key = attention.q_proj, attention.k_proj
    for projection in (query, key):
        projection.weight.data[:size] *= 0.1
    key.bias.data[:size] = torch.cat([torch.ones_like(frequencies), torch.zeros_like(frequencies)])
    query.bias.data[:size] = torch.cat([frequencies.cos(), -frequencies.sin()])
    key.bias.data[:size] *= length
    query.bias.data[:size] *= length


def vision_tower(model: Any) -> Any:
    """Return the module that holds the tower's embeddings and encoder."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def save(model: Any, tokenizer: Any, folder: Path, texts: Mapping[str, str]) -> None:
    """Write weights in bfloat16, config, tokenizer, processor and chat template to a folder.

    The folder is made beside its place and then renamed: it is never seen half written. One that is
    there is replaced.

    Args:
        model: with weights of any dtype, on any device.
        tokenizer: of ``build_tokenizer``.
        folder: the checkpoint's.
        texts: files to write beside the weights, by name.
    """
    from safetensors.torch import save_file

    temporary = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_processor(tokenizer, model.config, temporary)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "bfloat16"
    # A loaded model's parts say what they were loaded as.
    model.config.text_config.dtype = model.config.vision_config.dtype = None
    model.config.save_pretrained(temporary)
    model.generation_config.save_pretrained(temporary)
    weights = temporary / "model.safetensors"
    save_file(_weights(model), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # As the files beside it; safetensors lets nobody else read.
    for name, text in texts.items():
        (temporary / name).write_text(text)
    replaced = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights as the hub's checkpoints name them, the tied one once."""
    weights = {}
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            weights[hub_name(name)] = weight.detach().to("cpu", torch.bfloat16).contiguous()
    return weights


def hub_name(name: str) -> str:
    """Return what the hub's checkpoints call a weight of transformers' LLaVA-OneVision."""
    name = name.removeprefix("model.")
    tower = name.removeprefix("vision_tower.")
    if tower != name and tower.startswith(_TOWER_PARTS):
        return f"vision_tower.vision_model.{tower}"
    text = name.removeprefix("language_model.")
    return f"language_model.model.{text}" if text != name else name


def load(folder: Path) -> Any:
    """Return a saved model in float32."""
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
