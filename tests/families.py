"""Tiny models of the families with random weights, media, and an engine that answers about them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.model_shapes.llava_onevision import build_config, build_tokenizer
from tests.engines import run_plan
from tests.serving import message
from tests.tiny_models.spread import LOAD_FORMAT

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Threads that wait for each other on busy cores take ten times as long as one thread alone.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles the ranks of log probabilities, for half a minute on a new machine.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Of an engine of a tiny model."""
FPS = 2.0
"""Of the made-up videos, every frame of which is sampled."""


@dataclass(frozen=True)
class Media:
    """A made-up video, or with no frames an image."""

    width: int
    height: int
    num_frames: int = 0
    seed: int = 0
    shift: int | None = None
    """Pixels by which a textured picture moves across with each frame; None for a plain one."""

    @property
    def kind(self) -> str:
        return "video" if self.num_frames else "image"

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Things that move over a background, uint8 (T, H, W, 3), or (H, W, 3) of an image."""
        rng = np.random.default_rng(self.seed)
        num_frames = max(1, self.num_frames)
        frames = np.full((num_frames, self.height, self.width, 3), rng.integers(0, 255, 3))
        if self.shift is not None:
            cells = rng.integers(0, 255, (self.height // 10, self.width // 10, 3))
            texture = cells.repeat(10, 0).repeat(10, 1)
            frames[:] = [np.roll(texture, self.shift * number, 1) for number in range(num_frames)]
        for _ in range(6):
            color, size = rng.integers(0, 255, 3), rng.integers(10, 40)
            x, y = rng.integers(0, self.width), rng.integers(0, self.height)
            step = rng.integers(-6, 7, 2)
            for number, frame in enumerate(frames):
                left, top = max(0, x + number * step[0]), max(0, y + number * step[1])
                frame[top : top + size, left : left + size] = color
        noise = rng.integers(-6, 7, frames.shape)
        made = (frames + noise).clip(0, 255).astype(np.uint8)
        return made if self.num_frames else made[0]

    def metadata(self) -> dict[str, Any]:
        """What a video loader says of it."""
        return {
            "fps": FPS,
            "duration": self.num_frames / FPS,
            "total_num_frames": self.num_frames,
            "frames_indices": list(range(self.num_frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }


QWEN_MARKS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
"""What stands in a prompt for media."""
MARKS_FILE = "prompt_marks.json"
"""In a checkpoint's folder, where its marks are not Qwen's."""


def marks_of(folder: Path) -> dict[str, str]:
    """Return what stands for media in a checkpoint's prompts."""
    path = folder / MARKS_FILE
    return dict(json.loads(path.read_text())) if path.exists() else QWEN_MARKS


@dataclass(frozen=True)
class Question:
    """Media, each at the beginning of a prompt, and a text.

    Attributes:
        embeddings: a file of what the vision tower makes of the one video, with the names of
            vLLM's fields, sent in its place; none if empty.
    """

    media: tuple[Media, ...]
    ratio: float | None = None
    text: str = "What is this?"
    embeddings: str = ""

    def prompt(self, marks: Mapping[str, str] = QWEN_MARKS) -> str:
        parts = [marks[each.kind] for each in self.media]
        ask = f"{' and '.join(parts)}{self.text}"
        return f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"

    def data(self) -> dict[str, Any]:
        """The media as vLLM takes them."""
        if self.embeddings:
            return {"video": load_file(self.embeddings)}
        data: dict[str, list[Any]] = {}
        for each in self.media:
            pixels = each.pixels()
            item = (pixels, each.metadata()) if each.num_frames else Image.fromarray(pixels)
            data.setdefault(each.kind, []).append(item)
        return data


@dataclass(frozen=True)
class Answer:
    """What an engine made of a question."""

    num_prompt_tokens: int
    num_cached_tokens: int
    tokens: list[int]
    logprobs: list[float]
    """Of the tokens."""
    steps: list[dict[int, float]] = field(default_factory=list)
    """The likeliest tokens of each step and their log probabilities."""

    @property
    def first(self) -> dict[int, float]:
        """The likeliest tokens of the first step and their log probabilities."""
        return self.steps[0]


SAME = 1e-4
"""Rounding changes the log probabilities of an answer by less."""


def largest_difference(left: Answer, right: Answer) -> float:
    """Return how far apart two answers' log probabilities are, infinity for other tokens."""
    if left.tokens != right.tokens or left.num_prompt_tokens != right.num_prompt_tokens:
        return float("inf")
    pairs = zip(left.logprobs, right.logprobs, strict=True)
    return max(abs(one - other) for one, other in pairs)


def first_step_difference(answer: Answer, logprobs: torch.Tensor) -> float:
    """Return how far the likeliest tokens of an answer's first step are from what is expected."""
    return max(abs(value - float(logprobs[token])) for token, value in answer.first.items())


def largest_difference_to_a_tie(left: Answer, right: Answer) -> float:
    """Return how far apart two answers' log probabilities are up to the first tokens that differ.

    There both tokens count, so that a small difference means that they are about equally likely.
    It is infinity if an answer does not know the other one's token.
    """
    if left.num_prompt_tokens != right.num_prompt_tokens:
        return float("inf")
    differences = [0.0]
    pairs = zip(left.tokens, right.tokens, strict=True)
    for (mine, other), ours, theirs in zip(pairs, left.steps, right.steps, strict=True):
        for token in (mine, other):
            known = token in ours and token in theirs
            differences.append(abs(ours[token] - theirs[token]) if known else float("inf"))
        if mine != other:
            break
    return max(differences)


@dataclass(frozen=True)
class Observed:
    """What an engine answered, and how."""

    answers: list[list[Answer]]
    counters: dict[str, float]
    """vLLM's own at the end, without their prefix; none if ``disable_log_stats``."""


def ask(
    model: Path, rounds: Sequence[Sequence[Question]], *, stock: bool = False, **options: Any
) -> list[list[Answer]]:
    """Return the answers of an engine, see :func:`observe`."""
    return observe(model, rounds, stock=stock, **options).answers


def observe(
    model: Path,
    rounds: Sequence[Sequence[Question]],
    *,
    stock: bool = False,
    num_tokens: int = 6,
    **options: Any,
) -> Observed:
    """Return what a new engine answers; a round's questions are asked together.

    Args:
        model: folder of a checkpoint.
        rounds: one after the other.
        stock: whether vLLM has no plugin.
        num_tokens: of each answer.
        options: of vLLM's ``LLM``.
    """
    plan = {
        "num_tokens": num_tokens,
        "model": str(model),
        "options": options,
        "rounds": [[asdict(question) for question in questions] for questions in rounds],
    }
    result = run_plan(plan, stock=stock)
    answers = [[_answer(fields) for fields in answers] for answers in result["answers"]]
    return Observed(answers, result["counters"])


def changed_by(
    setting: Mapping[str, object], model: Path, videos: Sequence[Media]
) -> list[tuple[Media, float]]:
    """Return at which videos and ratios a setting changes an engine's answers.

    The engine with the setting is asked about each alone, then about all at once in two orders: an
    answer that depends on the others fails, and so does another number of prompt tokens. The later
    times of a video may be answered from its cached features.

    Args:
        setting: of ``mm_processor_kwargs``.
        model: folder of a checkpoint.
        videos: each is asked about at four ratios.
    """
    asked = [(video, ratio) for video in videos for ratio in (1.0, 0.5, 0.25, 0.1)]
    alone = [[Question((video,), ratio)] for video, ratio in asked]
    together = [question for (question,) in alone]
    options: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 4096}
    plain = ask(model, alone, **options)
    *first, batch, again = ask(
        model, [*alone, together, together[::-1]], mm_processor_kwargs=dict(setting), **options
    )
    changed = []
    for pair, (expected,), (answer,), *others in zip(
        asked, plain, first, batch, again[::-1], strict=True
    ):
        assert answer.num_prompt_tokens == expected.num_prompt_tokens, pair
        if largest_difference(expected, answer) > SAME:
            changed.append(pair)
        for other in others:
            assert largest_difference(answer, other) < SAME, pair
    return changed


@dataclass(frozen=True)
class Chat:
    """A chat's one message: videos and pictures (paths), and text."""

    parts: tuple[Path | str, ...]
    ratio: float | None = None
    budget: int | None = None
    """``max_retained_video_tokens``."""


def chat(
    model: Path, chats: Sequence[Chat], *, stock: bool = False, num_tokens: int = 8, **options: Any
) -> list[Answer | str]:
    """Return what a new engine answers to chats, one after the other, or with what error.

    Args:
        model: folder of a checkpoint.
        chats: are sent through its chat template, and its videos through the video loader.
        stock: whether vLLM has no plugin.
        num_tokens: of each answer.
        options: of vLLM's ``LLM``.
    """
    plan = {
        "num_tokens": num_tokens,
        "model": str(model),
        "options": options,
        "chats": [
            {
                "message": message(*each.parts),
                "kwargs": {
                    name: value
                    for name, value in (
                        ("retention_ratio", each.ratio),
                        ("max_retained_video_tokens", each.budget),
                    )
                    if value is not None
                },
            }
            for each in chats
        ],
    }
    answers = run_plan(plan, stock=stock)["answers"]
    return [fields if isinstance(fields, str) else _answer(fields) for fields in answers]


def _answer(fields: dict[str, Any]) -> Answer:
    steps = [{int(token): logprob for token, logprob in step} for step in fields["steps"]]
    return Answer(**{**fields, "steps": steps})


def answer_plan(llm: Any, plan: dict[str, Any]) -> dict[str, Any]:
    """Answer what :func:`observe` or :func:`chat` sends, in the engine's process."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=plan["num_tokens"], ignore_eos=True, logprobs=8
    )
    if "chats" in plan:
        return {"answers": [_answer_chat(llm, params, fields) for fields in plan["chats"]]}
    results = []
    for questions in plan["rounds"]:
        prompts = []
        for fields in questions:
            media = tuple(Media(**each) for each in fields.pop("media"))
            question = Question(media, **fields)
            prompt: dict[str, Any] = {
                "prompt": question.prompt(marks_of(Path(plan["model"]))),
                "multi_modal_data": question.data(),
            }
            if question.ratio is not None:
                prompt["mm_processor_kwargs"] = {"retention_ratio": question.ratio}
            prompts.append(prompt)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([_as_json(output) for output in outputs])
    counters: dict[str, float] = {}
    if not plan["options"].get("disable_log_stats", True):
        counters = {
            each.name.removeprefix("vllm:"): each.value
            for each in llm.get_metrics()
            if hasattr(each, "value")
        }
    return {"answers": results, "counters": counters}


def _answer_chat(llm: Any, params: Any, fields: dict[str, Any]) -> dict[str, Any] | str:
    options = {"mm_processor_kwargs": fields["kwargs"]} if fields["kwargs"] else {}
    from vllm.exceptions import VLLMValidationError

    try:
        (output,) = llm.chat([fields["message"]], params, use_tqdm=False, **options)
    except (ValueError, VLLMValidationError) as error:
        return str(error)
    return _as_json(output)


def _as_json(output: Any) -> dict[str, Any]:
    """Return vLLM's ``RequestOutput`` as the fields of an :class:`Answer`."""
    (completion,) = output.outputs
    logprobs = completion.logprobs or []  # An encode-only instance has none, and a made-up token.
    tokens = list(completion.token_ids)[: len(logprobs)]
    return {
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "tokens": tokens,
        "logprobs": [step[token].logprob for token, step in zip(tokens, logprobs, strict=True)],
        "steps": [[(token, each.logprob) for token, each in step.items()] for step in logprobs],
    }


def build_qwen_tokenizer() -> Any:
    """Return a byte-level tokenizer with Qwen-VL's special tokens, of use to all families."""
    return build_tokenizer(SPECIAL_TOKENS, "{{ messages }}")


TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}


def spread_weights(model: torch.nn.Module) -> None:
    """Give matrices orthogonal rows: of the usual small spread all patches would look alike.

    Where the language model compares tokens they are larger, so that it matters where tokens stand.
    """
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed_tokens" not in name:
            torch.nn.init.orthogonal_(weight.data.flatten(1))
            if "language_model" in name and ("q_proj" in name or "k_proj" in name):
                weight.data.mul_(1.8)


def tokens_of(tokenizer: Any) -> dict[str, int]:
    """Return the special tokens that a config names."""
    token = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def text_config(tokenizer: Any, **rope: Any) -> dict[str, Any]:
    """Return a language model's config."""
    return {
        **TEXT,
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def write(folder: Path, make: Any, config: Any, processor: Any) -> Any:
    """Write a checkpoint with made-up weights, and return its model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(config).eval()
        spread_weights(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return model


def build_qwen2_5_vl(folder: Path) -> Any:
    """Write a checkpoint of Qwen2.5-VL, at most 64 tokens a frame, and return its model."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = build_qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        text_config=text_config(tokenizer, mrope_section=[4, 6, 6]),
        tie_word_embeddings=False,
        **tokens_of(tokenizer),
    )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return write(folder, Qwen2_5_VLForConditionalGeneration, config, processor)


def build_qwen3_vl(folder: Path, *, moe: bool = False) -> Any:
    """Write a checkpoint of Qwen3-VL, at most 384 tokens a video, and return its model."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = build_qwen_tokenizer()
    text = text_config(tokenizer, mrope_section=[6, 5, 5], mrope_interleaved=True)
    text |= {"num_hidden_layers": 3, "head_dim": 32}
    if moe:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        text["norm_topk_prob"] = True
    config = (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=text,
        tie_word_embeddings=False,
        **tokens_of(tokenizer),
    )
    image = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=image, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 32 * 32 * 8, "longest_edge": 2 * 32 * 32 * 384}
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    make = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    model = write(folder, make, config, processor)
    if moe:
        _store_experts_as_the_hub_does(folder / "model.safetensors")
    return model


def build_llava_next_video(folder: Path) -> Any:
    """Write a checkpoint of LLaVA-NeXT-Video, 16 tokens a frame, and return its model."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextImageProcessor,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
    )

    tokenizer = build_qwen_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    side, patch_size = 56, 7
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=side,
            patch_size=patch_size,
        ),
        text_config=LlamaConfig(**text_config(tokenizer)),
        image_token_index=token("<|image_pad|>"),
        video_token_index=token("<|video_pad|>"),
        tie_word_embeddings=False,
    )
    processor = LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(),
        video_processor=LlavaNextVideoVideoProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        patch_size=patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        video_token="<|video_pad|>",
        image_token="<|image_pad|>",
    )
    model = write(folder, LlavaNextVideoForConditionalGeneration, config, processor)
    _name_tower_as_the_hub_does(folder / "model.safetensors")
    return model


def build_llava_onevision(folder: Path) -> Any:
    """Write a checkpoint of LLaVA-OneVision, 16 tokens a frame, and return its model."""
    from transformers import (
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = build_qwen_tokenizer()
    side, patch_size = 56, 7
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch_size,
        vision_use_head=False,
    )
    pinpoints = [[side, side], [side, 2 * side]]
    text = Qwen2Config(**text_config(tokenizer))
    tokens = ("<|image_pad|>", "<|video_pad|>")
    config = build_config(tokenizer, vision, text, pinpoints, tokens)
    size = {"height": side, "width": side}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(side // patch_size) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        video_token="<|video_pad|>",
        image_token="<|image_pad|>",
    )
    model = write(folder, LlavaOnevisionForConditionalGeneration, config, processor)
    _name_tower_as_the_hub_does(folder / "model.safetensors")
    return model


def build_draft(folder: Path, target: Path) -> None:
    """Write an EAGLE-3 draft model with random weights for a checkpoint of this module.

    What it guesses is hardly ever right. It reads the same places as the model that it drafts for.
    """
    text = json.loads((target / "config.json").read_text())["text_config"]
    width, inner = text["hidden_size"], text["intermediate_size"]
    heads, kv_heads, head_dim = 4, 2, 32
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "draft_vocab_size": text["vocab_size"],
        "dtype": "float32",
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        },
    }
    same = [
        *("hidden_size", "intermediate_size", "vocab_size", "rope_parameters"),
        *("rms_norm_eps", "max_position_embeddings", "eos_token_id", "pad_token_id"),
    ]
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    weights = {
        **{f"midlayer.{norm}.weight": torch.ones(width) for norm in norms},
        "norm.weight": torch.ones(width),
        "fc.weight": weight(width, 3 * width),
        "lm_head.weight": weight(text["vocab_size"], width),
        "midlayer.self_attn.q_proj.weight": weight(heads * head_dim, 2 * width),
        "midlayer.self_attn.k_proj.weight": weight(kv_heads * head_dim, 2 * width),
        "midlayer.self_attn.v_proj.weight": weight(kv_heads * head_dim, 2 * width),
        "midlayer.self_attn.o_proj.weight": weight(width, heads * head_dim),
        "midlayer.mlp.gate_proj.weight": weight(inner, width),
        "midlayer.mlp.up_proj.weight": weight(inner, width),
        "midlayer.mlp.down_proj.weight": weight(width, inner),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {name: text[name] for name in same}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def build_with_mtp(folder: Path, target: Path) -> None:
    """Copy a checkpoint of Qwen3.5, and give it a layer that predicts a second token.

    The layer is a copy of the language model's last one, which has full attention.
    """
    shutil.copytree(target, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    text["mtp_num_hidden_layers"] = 1
    path.write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    last = f"layers.{text['num_hidden_layers'] - 1}."
    width = text["hidden_size"]
    drawn = torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(0))
    weights |= {
        **{
            f"mtp.layers.0.{name.split(last)[1]}": weight.clone()
            for name, weight in weights.items()
            if f"language_model.{last}" in name
        },
        "mtp.fc.weight": (drawn / width**0.5).to(next(iter(weights.values())).dtype),
        **{
            f"mtp.{norm}.weight": torch.zeros(width)  # Qwen3.5 adds 1.
            for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
        },
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def quantize_language_model(folder: Path, source: Path) -> None:
    """Copy a checkpoint with its language model's layers in INT8, as compressed-tensors saves them.

    Rows of weights have a scale each, and so have tokens, when they arrive. The vision tower stays
    as it is.
    """
    shutil.copytree(source, folder)
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": "channel", "dynamic": False},
                "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", *(f"re:.*{part}.*" for part in _NOT_QUANTIZED)],
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items()):
        if not re.search(r"\.(self_attn|mlp)\.\w+_proj\.weight$", name):
            continue
        if any(part in name for part in _NOT_QUANTIZED):
            continue
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        weights[name] = (weight.float() / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


_NOT_QUANTIZED = ("visual", "vision_tower", "multi_modal_projector")


def _store_experts_as_the_hub_does(path: Path) -> None:
    """Swap the last two axes of experts' weights: transformers 5 saves them the other way, which
    vLLM 0.32 does not load.
    """
    weights = load_file(path)
    for name, weight in weights.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[name] = weight.transpose(1, 2).contiguous()
    save_file(weights, path, metadata={"format": "pt"})


def _name_tower_as_the_hub_does(path: Path) -> None:
    """Give the tower's weights the level that transformers 5 leaves out, as vLLM wants them."""
    tower = re.compile(r"vision_tower\.(?!vision_model\.)")
    weights = {
        tower.sub("vision_tower.vision_model.", name): weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


WIDE, TALL, SHORT = Media(320, 200, 12, 1), Media(120, 400, 7, 2), Media(160, 160, 2, 3)
PICTURE = Media(200, 120, 0, 4)
RATIOS = (1.0, 0.5, 0.25, 0.1, 0.01)


@dataclass(eq=False)
class Family:
    """A tiny model of a family, what is asked of it, and what engines answered, each when needed.

    Attributes:
        build: writes the checkpoint and returns transformers' model, None for one without weights.
        num_tokens: N of each of the three videos.
        place: where the checkpoint is to be.
        mixed: videos and images of one prompt, none where a prompt may have one video alone.
        options: of all its engines.
        chunk: of its engines whose steps and caches are small.
        other_ratio: of ``other``, whose video ends behind a block of the prefix cache.
        ratios: at which each video is asked about.
        num_answered: tokens of an answer.
        caches_prefixes: whether the CPU engine can.
        num_cache_groups: of layers whose caches take blocks of their own.
        tolerance: how far log probabilities may be apart where rounding may differ.
    """

    build: Callable[[Path], Any]
    num_tokens: Mapping[Media, int]
    place: Path
    mixed: tuple[Media, ...] = (WIDE, PICTURE, SHORT, TALL)
    options: Mapping[str, Any] = field(default_factory=dict)
    chunk: Mapping[str, Any] = field(
        default_factory=lambda: {"block_size": 32, "max_num_batched_tokens": 64}
    )
    other_ratio: float = 0.5
    ratios: tuple[float, ...] = RATIOS
    num_answered: int = 6
    caches_prefixes: bool = True
    num_cache_groups: int = 1
    tolerance: float = 1e-4

    @cached_property
    def model(self) -> Any:
        """transformers' model."""
        return self.build(self.place)

    @property
    def folder(self) -> Path:
        """The checkpoint's, written if it was not."""
        self.place.mkdir(parents=True, exist_ok=True)
        _ = self.model
        return self.place

    @property
    def single(self) -> list[Question]:
        """Each video alone at each ratio."""
        return [Question((media,), ratio) for media in self.num_tokens for ratio in self.ratios]

    @property
    def several(self) -> list[Question]:
        """Videos and an image in one prompt."""
        ratios = (1.0, 0.25, 0.05) if self.mixed else ()
        return [Question(self.mixed, ratio) for ratio in ratios]

    @property
    def plain(self) -> list[Question]:
        """No video."""
        return [Question((PICTURE,)), Question(())] if self.mixed else [Question(())]

    @property
    def other(self) -> Question:
        """Asks otherwise about a video of the others."""
        return Question((WIDE,), self.other_ratio, "Who is it?")

    @cached_property
    def stock(self) -> dict[Question, Answer]:
        """What vLLM answers without any plugin."""
        with_video = [*self.single, *self.several]
        questions = [Question(each.media) for each in with_video if each.ratio == 1.0]
        return self._alone([*questions, *self.plain], stock=True)

    @cached_property
    def whole(self) -> dict[Question, Answer]:
        """What ours answers to each question alone, in one step and without a prefix cache."""
        questions = [*self.single, *self.several, *self.plain, self.other]
        return self._alone(questions, max_num_batched_tokens=8192)

    @cached_property
    def chunked(self) -> list[list[Answer]]:
        """What ours answers in small steps, with a prefix cache if it has one: all together, again
        in another order, those of several videos again alone, and ``other`` behind its like.
        Without a cache: all together.
        """
        all_of_them = [*self.single, *self.several]
        like = replace(self.other, text=Question.text)
        again = [all_of_them[::-1], self.several, [like], [self.other]]
        return ask(
            self.folder,
            [all_of_them, *again] if self.caches_prefixes else [all_of_them],
            max_model_len=4096,
            enable_prefix_caching=self.caches_prefixes,
            max_num_seqs=16,
            num_tokens=self.num_answered,
            **{**self.options, **self.chunk},
        )

    def _alone(self, questions: list[Question], **options: Any) -> dict[Question, Answer]:
        rounds = ask(
            self.folder,
            [[question] for question in questions],
            max_model_len=4096,
            enable_prefix_caching=False,
            num_tokens=self.num_answered,
            **self.options,
            **options,
        )
        return {question: answer for question, (answer,) in zip(questions, rounds, strict=True)}


BFLOAT16 = {"dtype": "bfloat16"}
BFLOAT16_STEPS = 4e-2
"""Between log probabilities of about -4, of which bfloat16 holds multiples of 1/64."""
NO_WEIGHTS = {"load_format": LOAD_FORMAT, "trust_remote_code": True}
WITHIN_WINDOWS = {
    **{"block_size": 32, "max_num_batched_tokens": 64},
    "prefix_cache_retention_interval": 32,
}
"""Where layers with a sliding window keep, by vLLM's default, the end of a prompt alone."""
LARGE_STEPS = {"max_num_batched_tokens": 512}
"""Where states of recurrent layers are cached in blocks of hundreds of tokens."""


FAMILIES = [
    *("llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"),
    *("glm4v", "internvl", "gemma4", "nemotron"),
]
"""All but LLaVA-OneVision, which is the demo's: servers of it are tested."""
VARIANTS = [
    *("qwen3_5_moe", "glm46v", "internvl_chat", "nemotron_omni"),
    *("cosmos3", "exaone4_5", "interns2_preview"),
]
"""Models that differ from one of the families in little."""


def tiny_families(folder: Path) -> dict[str, Family]:
    """Return a model of each family, to be written below a folder.

    With Qwen-VL and GLM a temporal patch holds two frames; the seventh of TALL is doubled. Their
    sizes in tokens are 10 x 6, 4 x 14 and 6 x 6 with Qwen2-VL, Qwen2.5-VL and GLM, 10 x 6, 4 x 12
    and 5 x 5 with Qwen3-VL.
    """
    from tests.tiny_models import gemma4, glm4v, internvl, nemotron, qwen2_vl, qwen3_5

    of_llava = {media: media.num_frames * 16 for media in (WIDE, TALL, SHORT)}
    of_pairs = {media: (media.num_frames + 1) // 2 * 16 for media in (WIDE, TALL, SHORT)}
    of_qwen2_5 = {WIDE: 6 * 60, TALL: 4 * 56, SHORT: 36}
    of_qwen3 = {WIDE: 6 * 60, TALL: 4 * 48, SHORT: 25}
    # The CPU's kernels of recurrent layers take seconds for a prompt.
    few = {"ratios": (1.0, 0.25, 0.01), "num_answered": 3}
    recurrent: dict[str, Any] = {
        **few,
        "options": BFLOAT16,
        "chunk": LARGE_STEPS,
        "other_ratio": 0.9,
        "tolerance": BFLOAT16_STEPS,
    }
    nemotrons: dict[str, Any] = {
        **few,
        "options": BFLOAT16 | NO_WEIGHTS,
        "chunk": LARGE_STEPS,
        "caches_prefixes": False,
        "tolerance": BFLOAT16_STEPS,
    }
    one_video = {"mixed": (PICTURE, WIDE)}
    made: dict[str, tuple[Callable[[Path], Any], Mapping[Media, int], dict[str, Any]]] = {
        "llava_onevision": (build_llava_onevision, of_llava, one_video),
        "llava_next_video": (build_llava_next_video, of_llava, {"mixed": ()}),
        "qwen2_vl": (qwen2_vl.build_qwen2_vl, of_qwen2_5, {}),
        "qwen2_5_vl": (build_qwen2_5_vl, of_qwen2_5, {}),
        "qwen3_vl": (build_qwen3_vl, of_qwen3, {}),
        "qwen3_5": (qwen3_5.build_qwen3_5, of_qwen3, recurrent),
        "qwen3_5_moe": (partial(qwen3_5.build_qwen3_5, moe=True), of_qwen3, recurrent),
        "glm4v": (glm4v.build_glm4v, of_qwen2_5, one_video),
        "glm46v": (partial(glm4v.build_glm4v, version="4.6"), of_qwen2_5, one_video),
        "internvl": (internvl.build_internvl, of_llava, {}),
        "internvl_chat": (
            internvl.build_internvl_chat,
            of_llava,
            {"options": NO_WEIGHTS, "other_ratio": 0.55},
        ),
        "gemma4": (
            gemma4.build_gemma4,
            {WIDE: 12 * 60, TALL: 7 * 60, SHORT: 2 * 64},
            {"chunk": WITHIN_WINDOWS, "num_cache_groups": 2},
        ),
        "nemotron": (nemotron.build_nemotron, of_llava, nemotrons),
        "nemotron_omni": (
            partial(nemotron.build_nemotron, frames_at_once=2),
            of_pairs,
            nemotrons,
        ),
        "cosmos3": (qwen3_5.build_cosmos3, of_qwen3, {"options": NO_WEIGHTS}),
        "exaone4_5": (
            qwen3_5.build_exaone4_5,
            of_qwen2_5,
            {"options": NO_WEIGHTS, "chunk": WITHIN_WINDOWS},
        ),
        "interns2_preview": (
            qwen3_5.build_interns2_preview,
            of_qwen3,
            {**recurrent, "options": BFLOAT16 | NO_WEIGHTS},
        ),
    }
    return {
        name: Family(build, num_tokens, folder / name, **differences)
        for name, (build, num_tokens, differences) in made.items()
    }
