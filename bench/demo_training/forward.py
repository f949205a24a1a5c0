"""The demo model's forward pass for training: one clip, many questions.

The layers are written out over the Hugging Face model's own modules. Attention is split where that
saves most: the clip's tokens are purely causal, the questions have a mask. Tests hold the result
against the model's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bench.demo_training.model import vision_tower
from bench.demo_training.packing import PackedQuestions, question_mask
from bench.demo_training.places import usual_places

Tensor = torch.Tensor


def tower_layer(layer: Any, hidden: Tensor) -> Tensor:
    """Return the output of one layer of the vision tower, (B, N, D)."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden).to(hidden.dtype)
    query, key, value = (
        project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden).to(hidden.dtype))


def text_layer(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """Return the output of one layer of the language model, (B, S + L, D).

    Args:
        layer: of the language model.
        hidden: (B, S + L, D), S tokens of the clip and L of the questions.
        cos: (B, 1, S + L, head size), of the positions.
        sin: likewise.
        mask: bool (B, 1, L, S + L), what the questions see.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    num_shared = hidden.shape[1] - mask.shape[2]
    clip = F.scaled_dot_product_attention(
        query[:, :, :num_shared], key[:, :, :num_shared], value[:, :, :num_shared], is_causal=True
    )
    questions = F.scaled_dot_product_attention(query[:, :, num_shared:], key, value, attn_mask=mask)
    mixed = torch.cat([clip, questions], dim=2).transpose(1, 2).flatten(2)
    hidden = hidden + attention.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


class PackedModel(nn.Module):
    """A LLaVA-OneVision model that answers packed questions.

    Its language model must have as many key heads as query heads.
    """

    def __init__(
        self, model: Any, prefix: tuple[int, ...], compiled_num_frames: int | None = None
    ) -> None:
        """Take the model, whose weights are shared.

        Args:
            model: a LlavaOnevisionForConditionalGeneration.
            prefix: the tokens before a video.
            compiled_num_frames: in training, clips of so many frames go through compiled layers.
        """
        super().__init__()
        text = model.config.text_config
        if text.num_key_value_heads != text.num_attention_heads:
            raise ValueError(
                "the packed forward needs as many key heads as query heads, got "
                f"{text.num_key_value_heads} and {text.num_attention_heads}: set them alike"
            )
        self.model = model
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)
        self._compiled_num_frames = compiled_num_frames
        vision = model.config.vision_config
        self._tokens_per_frame = (-(-vision.image_size // vision.patch_size // 2)) ** 2
        # Compiled for one shape each: other lengths are too rare to be worth the wait.
        self._compiled_tower_layer = torch.compile(tower_layer, dynamic=False)
        self._compiled_text_layer = torch.compile(text_layer, dynamic=False)

    def _is_compiled(self, num_frames: int) -> bool:
        return self.training and num_frames == self._compiled_num_frames

    def video_tokens(self, pixels: Tensor) -> Tensor:
        """Return what compression sees, (B, T, P, D), from normalised pixels (B, T, 3, H, W)."""
        is_compiled = self._is_compiled(pixels.shape[1])
        encode_layer = self._compiled_tower_layer if is_compiled else tower_layer
        tower = vision_tower(self.model)
        hidden = tower.embeddings(pixels.flatten(0, 1))
        hidden = hidden.to(_stream_dtype(hidden))
        for layer in tower.encoder.layers:
            hidden = encode_layer(layer, hidden)
        inner = self.model.model
        tokens = inner.apply_pooling(inner.multi_modal_projector(hidden))
        return tokens.unflatten(0, pixels.shape[:2])

    def forward(
        self, video: Tensor, questions: PackedQuestions, places: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states of the questions' tokens, (B, L, D).

        Args:
            video: (B, K, D), K tokens of each clip, compressed or not, without the newline.
            questions: about each clip.
            places: (B, K) float32, increasing from 0, the positions of the video's tokens counted
                from its first; one by one by default, as in serving.
        """
        is_compiled = self._is_compiled(video.shape[1] // self._tokens_per_frame)
        read_layer = self._compiled_text_layer if is_compiled else text_layer
        text, embed = self.model.model.language_model, self.model.get_input_embeddings()
        batch = video.shape[0]
        prefix = embed(self.prefix).expand(batch, -1, -1)
        newline = self.model.model.image_newline.expand(batch, 1, -1)
        parts = [prefix, video, newline, embed(questions.tokens)]
        hidden = torch.cat([part.to(_stream_dtype(video)) for part in parts], dim=1)
        num_shared = hidden.shape[1] - questions.tokens.shape[1]
        if places is None:
            places = usual_places(video.shape[1], video.device).expand(batch, -1)
        before = usual_places(prefix.shape[1], video.device).expand(batch, -1)
        places = prefix.shape[1] + places
        end = places[:, -1:] + 1
        positions = torch.cat([before, places, end, end + 1 + questions.offsets], dim=1)
        cos, sin = (part[:, None] for part in text.rotary_emb(hidden, positions))
        mask = question_mask(questions.questions, num_shared)
        for layer in text.layers:
            hidden = read_layer(layer, hidden, cos, sin, mask)
        return text.norm(hidden[:, num_shared:])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the token that follows each, float32 (B, L, V)."""
        return self.model.lm_head(hidden).float()


def _stream_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of the residual stream: autocast's, where it is on."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
