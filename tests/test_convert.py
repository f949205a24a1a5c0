"""Converted checkpoints have the original's features, logits and counts.

Every weight is accounted for, and errors name the cause.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from bench.numbered_clips import decode_all
from scissor_vllm import num_retained_tokens
from scissor_vllm.convert.command import REPORT, convert, main
from scissor_vllm.convert.config import Newlines, converted_config, tower_config
from tests import original_llava as original
from tests.conftest import NUM_FRAMES
from tests.families import Answer, Chat, chat, largest_difference
from tests.original_llava import TOKENS_PER_FRAME, TOWER, Weights
from tests.serving import compress_as_served

NEWLINE = "model.image_newline"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def without(weights: Weights, *names: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name not in names}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return original.original_weights()


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP repository of which only the config is there: the tests' tower has no known name."""
    return original.save_siglip(tmp_path_factory.mktemp("siglip") / "config")


def converted_weights(folder: Path) -> dict[str, Tensor]:
    return {
        name: weight
        for path in folder.glob("*.safetensors")
        for name, weight in load_file(path).items()
    }


# The model computes what the original does.


def assert_computes_the_same(folder: Path, weights: Weights) -> None:
    """Features of a video and logits of a prompt, by transformers and from the original weights."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder)
    side, num_frames = original.IMAGE_SIZE, 3
    pixels = torch.randn(num_frames, 3, side, side, generator=torch.Generator().manual_seed(0))
    rows = original.video_rows(weights, pixels)
    rows = torch.cat([rows, weights[NEWLINE][None]])
    video = model.config.video_token_index
    prompt = torch.tensor([65, 66, *[video] * (num_frames * TOKENS_PER_FRAME + 1), 67, 68, 69])
    with torch.no_grad():
        features = model.model.get_video_features(pixels[None]).pooler_output
        answer = model(
            input_ids=prompt[None],
            attention_mask=torch.ones(1, len(prompt)),
            pixel_values_videos=pixels[None],
        ).logits[0]
    torch.testing.assert_close(features.flatten(0, -2), rows, atol=1e-5, rtol=1e-5)
    expected = original.logits(weights, original.embedded(weights, prompt, video, rows))
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_features_and_logits_are_those_of_the_original_weights(
    tmp_path: Path, weights: Weights, siglip: Path, num_shards: int, suffix: str
) -> None:
    source = original.save_original(tmp_path / "source", weights, num_shards, suffix)
    convert(source, tmp_path / "out", vision_tower=siglip, max_shard_bytes=500_000)
    assert_computes_the_same(tmp_path / "out", weights)


@pytest.mark.parametrize("with_copy", [False, True], ids=["one", "both"])
def test_tied_embeddings_stay_tied(
    tmp_path: Path, weights: Weights, siglip: Path, with_copy: bool
) -> None:
    tied = without(weights, HEAD)
    stored = {**tied, HEAD: tied[EMBEDDING].clone()} if with_copy else tied
    source = original.save_original(tmp_path / "source", stored, tie_word_embeddings=True)
    convert(source, tmp_path / "out", vision_tower=siglip)
    assert_computes_the_same(tmp_path / "out", tied)
    assert not any("lm_head" in name for name in converted_weights(tmp_path / "out"))


def test_a_frozen_tower_comes_from_its_own_repository_without_its_last_layer(
    tmp_path: Path, siglip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language, tower = original.original_weights(tower=False), original.siglip_weights()
    source = original.save_original(
        tmp_path / "source", language, mm_vision_tower="a/siglip-so400m-patch14-384"
    )
    error = refused(capsys, source, tmp_path / "out")
    assert "a/siglip-so400m-patch14-384" in error
    assert "--vision-tower" in error
    repository = original.save_siglip(tmp_path / "siglip", tower)
    report = convert(source, tmp_path / "out", vision_tower=repository)
    assert_computes_the_same(tmp_path / "out", {**language, **original.as_frozen_tower(tower)})
    last = f"{TOWER}encoder.layers.{original.VISION_LAYERS - 1}."
    assert {name for name in report["left_out"] if "encoder" in name} == {
        name for name in original.as_frozen_tower(tower) if name.startswith(last)
    }


def test_a_tower_that_was_trained_is_not_replaced_by_its_repositorys(
    tmp_path: Path, weights: Weights
) -> None:
    source = original.save_original(tmp_path / "source", weights)
    repository = original.save_siglip(tmp_path / "siglip", original.siglip_weights())
    convert(source, tmp_path / "out", vision_tower=repository)
    assert_computes_the_same(tmp_path / "out", weights)


def test_the_named_tower_has_the_shapes_of_transformers_own_conversion() -> None:
    source = original.original_config(mm_vision_tower="google/siglip-so400m-patch14-384")
    config = converted_config(source, tower_config(source, None), Newlines(True, True), (1, 2))
    public = LlavaOnevisionConfig()
    assert config.vision_config.to_dict() == public.vision_config.to_dict()
    assert config.vision_feature_layer == public.vision_feature_layer
    assert config.vision_feature_select_strategy == public.vision_feature_select_strategy


# Weights: all accounted for, none touched.


def test_every_weight_is_there_with_its_checksum_and_none_is_changed(
    tmp_path: Path, weights: Weights, siglip: Path
) -> None:
    stored = {name: weight.bfloat16() for name, weight in weights.items()}
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    stored[extra] = torch.ones(4)
    source = original.save_original(tmp_path / "source", stored, 2, torch_dtype="bfloat16")
    report = convert(source, tmp_path / "out", vision_tower=siglip, max_shard_bytes=300_000)
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report
    converted = converted_weights(tmp_path / "out")
    assert converted.keys() == report["weights"].keys()
    for name, weight in converted.items():
        entry = report["weights"][name]
        assert torch.equal(weight, stored[entry["from"]])
        assert entry["sha256"] == command_checksum(weight)
    assert {entry["from"] for entry in report["weights"].values()} == stored.keys() - {extra}
    assert report["left_out"].keys() == {extra}


def command_checksum(weight: Tensor) -> str:
    """SHA-256 of a tensor's bytes as Python's ints give them."""
    import hashlib

    words = weight.view(torch.int16).flatten().tolist()
    return hashlib.sha256(
        b"".join(w.to_bytes(2, sys.byteorder, signed=True) for w in words)
    ).hexdigest()


def test_the_checksum_does_not_depend_on_the_files_and_changes_with_a_value(
    tmp_path: Path, weights: Weights, siglip: Path
) -> None:
    def of(name: str, stored: Weights, *args: Any) -> str:
        source = original.save_original(tmp_path / name, stored, *args)
        return str(convert(source, tmp_path / f"{name}-out", vision_tower=siglip)["sha256"])

    assert of("one", weights) == of("three", weights, 3, "bin")
    changed = {**weights, NEWLINE: weights[NEWLINE] + 1}
    assert of("changed", changed) != of("same", weights, 2)


def test_files_keep_within_their_size_and_the_index_names_them(
    tmp_path: Path, weights: Weights, siglip: Path
) -> None:
    source = original.save_original(tmp_path / "source", weights)
    limit = 200_000
    report = convert(source, tmp_path / "out", vision_tower=siglip, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    sizes = [sum(weight.nbytes for weight in held.values()) for held in files.values()]
    assert max(sizes) <= limit
    assert sum(sizes) == index["metadata"]["total_size"] == report["num_bytes"]


MEMORY = r"""
    import re, sys
    from pathlib import Path
    import torch
    from scissor_vllm.convert.command import convert

    torch.set_num_threads(1)
    small, large, siglip, out = map(Path, sys.argv[1:])


    def status(key):
        text = Path("/proc/self/status").read_text()
        return int(re.search(key + r":\s+(\d+) kB", text)[1]) * 1024


    convert(small, out / "small", vision_tower=siglip)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    convert(large, out / "large", vision_tower=siglip)
    print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_memory_stays_below_two_shards(
    tmp_path: Path, weights: Weights, siglip: Path, suffix: str
) -> None:
    num_layers, inner = 8, 16384
    large = original.large_weights(num_layers, inner)
    sizes = {"num_hidden_layers": num_layers, "intermediate_size": inner}
    source = original.save_original(tmp_path / "large", large, num_layers, suffix, **sizes)
    small = original.save_original(tmp_path / "small", weights)
    arguments = [str(path) for path in (small, source, siglip, tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    shard = max(path.stat().st_size for path in source.glob(f"*.{suffix}"))
    assert sum(path.stat().st_size for path in source.glob(f"*.{suffix}")) > 4 * shard
    assert int(run.stdout) < 2 * shard


# What cannot be converted is refused, and nothing is left.


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Return what is printed for a conversion that is refused."""
    out = Path(argv[1])
    assert main([str(argument) for argument in argv]) == 1
    assert not list(out.parent.glob(f".{out.name}*"))
    return capsys.readouterr().err


def test_every_weight_that_fits_nowhere_is_named(
    tmp_path: Path, weights: Weights, siglip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = ["model.layers.9.mlp.up_proj.weight", "model.vision_resampler.mm_projector.weight",
               f"{TOWER}embeddings.class_embedding"]  # fmt: skip
    stored = without(weights, "model.norm.weight", NEWLINE)
    stored |= {name: torch.ones(2) for name in strange}
    stored["model.mm_projector.2.bias"] = torch.ones(7)
    source = original.save_original(tmp_path / "source", stored)
    error = refused(capsys, source, tmp_path / "out", "--vision-tower", siglip)
    nowhere, _, rest = error.partition("1 weights are missing")
    assert "3 weights fit nowhere" in nowhere
    assert all(name in nowhere for name in strange)
    missing, _, misshapen = rest.partition("1 weights have another shape")
    assert "model.norm.weight" in missing
    assert "model.mm_projector.2.bias is (7,), config.json says (128,)" in misshapen
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlavaLlamaForCausalLM"]}, r"LlavaQwenForCausalLM.*LlavaLlama"),
        (
            {"mm_projector_type": "linear"},
            r"mm_projector_type is 'linear' and must be 'mlp2x_gelu'",
        ),
        ({"mm_spatial_pool_mode": "average"}, r"mm_spatial_pool_mode is 'average'"),
        ({"mm_newline_position": "grid"}, r"mm_newline_position is 'grid'.*one_token"),
        ({"vocab_size": 260}, r"tokens 259 and 260, but the embedding has 260 rows"),
        ({"image_grid_pinpoints": "all"}, r"image_grid_pinpoints must be .*got 'all'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_vllm_computes_otherwise_is_named(
    tmp_path: Path, weights: Weights, siglip: Path, changes: dict[str, Any], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = original.save_original(tmp_path / "source", weights, **changes)
    error = refused(capsys, source, tmp_path / "out", "--vision-tower", siglip)
    assert re.search(message, error), error


def test_a_tower_of_unknown_shapes_is_asked_for(
    tmp_path: Path, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    source = original.save_original(tmp_path / "source", weights)
    error = refused(capsys, source, tmp_path / "out")
    assert re.search(r"'google/siglip-tiny' are not known.*--vision-tower", error)


def test_an_output_embedding_that_only_claims_to_be_tied_is_refused(
    tmp_path: Path, weights: Weights, siglip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = original.save_original(tmp_path / "source", weights, tie_word_embeddings=True)
    error = refused(capsys, source, tmp_path / "out", "--vision-tower", siglip)
    assert re.search(r"lm_head.weight differs.*tie_word_embeddings to false", error)


def test_a_folder_that_exists_is_not_touched(
    tmp_path: Path, weights: Weights, siglip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = original.save_original(tmp_path / "source", weights)
    (tmp_path / "out").mkdir()
    assert "exists" in refused(capsys, source, tmp_path / "out", "--vision-tower", siglip)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_that_was_not_downloaded_is_named(
    tmp_path: Path, weights: Weights, siglip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = original.save_original(tmp_path / "source", weights, 3)
    (source / "model-00002-of-00003.safetensors").unlink()
    error = refused(capsys, source, tmp_path / "out", "--vision-tower", siglip)
    assert "model-00002-of-00003.safetensors" in error


DAMAGES = {
    "config.json": ["", "{", "[1]", '"text"', '{"architectures": 1}', "\x00", "[" * 9999],
    "tokenizer.json": ["", "{", "[]"],
    "model.safetensors": ["", "no weights", "{}" * 99],
}
SETTINGS: dict[str, Any] = {
    "hidden_size": "wide",
    "num_attention_heads": [1],
    "vocab_size": {"a": 1},
    "mm_newline_position": ["grid"],
    "image_grid_pinpoints": [1, 2],
    "mm_projector_type": ["linear"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in DAMAGES.items() for text in texts]
)
def test_a_damaged_file_is_named_in_one_sentence(
    tmp_path: Path, weights: Weights, siglip: Path, capsys: pytest.CaptureFixture[str],
    name: str, text: str,
) -> None:  # fmt: skip
    source = original.save_original(tmp_path / "source", weights)
    for path in source.glob(name.replace(".safetensors", "*.safetensors")):
        path.write_text(text)
    error = refused(capsys, source, tmp_path / "out", "--vision-tower", siglip)
    assert str(source) in error or name in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_of_a_wrong_type_is_refused_in_one_sentence(
    tmp_path: Path, weights: Weights, siglip: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    source = original.save_original(tmp_path / "source", weights, **{key: SETTINGS[key]})
    error = refused(capsys, source, tmp_path / "out", "--vision-tower", siglip)
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("scissor-vllm convert: ")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named_in_one_sentence(
    tmp_path: Path, weights: Weights, siglip: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    source = original.save_original(tmp_path / "source", weights, 3)
    (source / "model.safetensors.index.json").write_text(text)
    error = refused(capsys, source, tmp_path / "out", "--vision-tower", siglip)
    assert "model.safetensors.index.json" in error
    assert len(error.strip().splitlines()) == 1


def test_a_conversion_that_breaks_off_leaves_nothing(
    tmp_path: Path, weights: Weights, siglip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("scissor_vllm.convert.processing.save_processor", full)
    source = original.save_original(tmp_path / "source", weights)
    with pytest.raises(OSError, match="No space"):
        convert(source, tmp_path / "made" / "out", vision_tower=siglip)
    assert not list((tmp_path / "made").iterdir())


# Prompts and pixels.


@pytest.fixture(scope="module")
def with_newline(tmp_path_factory: pytest.TempPathFactory, weights: Weights, siglip: Path) -> Path:
    folder = tmp_path_factory.mktemp("with")
    source = original.save_original(folder / "source", weights)
    convert(source, folder / "out", vision_tower=siglip)
    return folder / "out"


@pytest.fixture(scope="module")
def without_newline(
    tmp_path_factory: pytest.TempPathFactory, weights: Weights, siglip: Path
) -> Path:
    """The checkpoint as LLaVA-Scissor's are."""
    folder = tmp_path_factory.mktemp("without")
    stored = without(weights, NEWLINE)
    source = original.save_original(folder / "source", stored, 2, mm_patch_merge_type="spatial")
    assert main([str(source), str(folder / "out"), "--vision-tower", str(siglip)]) == 0
    return folder / "out"


def test_a_prompt_is_the_originals_with_one_token_for_a_video(with_newline: Path) -> None:
    processor = AutoProcessor.from_pretrained(with_newline)
    config = LlavaOnevisionConfig.from_pretrained(with_newline)
    content = [{"type": "video"}, {"type": "text", "text": "Why?"}]
    (text,) = processor.apply_chat_template(
        [[{"role": "user", "content": content}]], add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = processor.tokenizer(text).input_ids
    assert ids.count(config.video_token_index) == 1
    assert processor.tokenizer.encode("<image>") == [config.image_token_index]
    # What the original config says is a token of another tokenizer.
    assert config.image_token_index != original.original_config()["image_token_index"]


def test_a_system_message_takes_the_place_of_the_usual_one(with_newline: Path) -> None:
    processor = AutoProcessor.from_pretrained(with_newline)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )


def test_sampling_settings_and_the_trainers_model_type_are_accepted(
    tmp_path: Path, weights: Weights, siglip: Path
) -> None:
    source = original.save_original(tmp_path / "source", weights, model_type="llava_qwen")
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    convert(source, tmp_path / "out", vision_tower=siglip)
    assert_computes_the_same(tmp_path / "out", weights)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == {"temperature": 0.7}


def test_pixels_are_normalized_as_siglips(with_newline: Path) -> None:
    processor = AutoProcessor.from_pretrained(with_newline)
    frames = np.full((2, original.IMAGE_SIZE, original.IMAGE_SIZE, 3), 51, dtype=np.uint8)
    pixels = processor.video_processor(frames, return_tensors="pt").pixel_values_videos
    torch.testing.assert_close(pixels, torch.full_like(pixels, 2 * 51 / 255 - 1))


def test_pinpoints_may_be_written_as_a_range_of_tiles(
    tmp_path: Path, weights: Weights, siglip: Path
) -> None:
    source = original.save_original(
        tmp_path / "source", weights, image_grid_pinpoints="(1x1),...,(2x3)"
    )
    convert(source, tmp_path / "out", vision_tower=siglip)
    config = LlavaOnevisionConfig.from_pretrained(tmp_path / "out")
    assert [tuple(size) for size in config.image_grid_pinpoints] == [
        (100, 100), (100, 200), (100, 300), (200, 100), (200, 200), (200, 300)
    ]  # fmt: skip


# Counts, by vLLM's processor.


@pytest.fixture
def processors() -> Iterator[Any]:
    """Give ours and stock's processing info for a model."""
    from vllm.config import ModelConfig
    from vllm.model_executor.models import llava_onevision as stock
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from scissor_vllm.frontend.frame_cache import FRAMES
    from scissor_vllm.plugin import register

    register()

    def infos(model: Path) -> tuple[Any, Any]:
        config = ModelConfig(model=str(model), dtype="float32")
        ours = MULTIMODAL_REGISTRY.create_processor(config).info
        return ours, stock.LlavaOnevisionProcessingInfo(ours.ctx)

    yield infos
    FRAMES.resize(0)


def test_a_video_counts_as_in_stock_vllm_less_the_newline_that_is_not_there(
    processors: Any, with_newline: Path, without_newline: Path, tmp_path: Path, weights: Weights,
    siglip: Path,
) -> None:  # fmt: skip
    source = original.save_original(tmp_path / "source", weights)
    convert(source, tmp_path / "out", vision_tower=siglip, video_newline=False)
    for model, num_newlines in ((with_newline, 1), (without_newline, 0), (tmp_path / "out", 0)):
        ours, stock = processors(model)
        for num_frames in (1, 7, 32):
            size = {"image_width": 640, "image_height": 360}
            counted = stock.get_num_video_tokens(**size, num_frames=num_frames)
            assert counted == num_frames * TOKENS_PER_FRAME + 1
            assert ours.get_num_video_tokens(**size, num_frames=num_frames) == (
                counted - 1 + num_newlines
            )
            assert ours.get_num_fixed_tokens() == num_newlines
            assert (
                ours.get_num_compressible_tokens(width=640, height=360, num_frames=num_frames)
                == num_frames * TOKENS_PER_FRAME
            )


def test_images_are_served_where_a_newline_can_end_their_lines(
    processors: Any, with_newline: Path, without_newline: Path
) -> None:
    assert processors(with_newline)[0].get_supported_mm_limits().keys() == {"image", "video"}
    assert processors(without_newline)[0].get_supported_mm_limits().keys() == {"video"}


# Served.

SERVED: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 4096}


def answered(answer: Answer | str) -> Answer:
    assert isinstance(answer, Answer), answer
    return answer


@pytest.fixture(scope="module")
def served(
    engines: None, without_newline: Path, clips: dict[str, Path]
) -> dict[str | float, Answer | str]:
    """What ours answers with the checkpoint without newline, by ratio and by what is asked."""
    chats: dict[str | float, Chat] = {
        1.0: Chat((clips["short"], "Why?"), 1.0),
        0.25: Chat((clips["short"], "Why?"), 0.25),
        "picture": Chat((clips["picture"], "Why?")),
        "text": Chat(("Why?",)),
    }
    answers = chat(without_newline, list(chats.values()), enable_prefix_caching=False, **SERVED)
    return dict(zip(chats, answers, strict=True))


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_a_checkpoint_without_newline_is_served_without_it(
    served: dict[str | float, Answer | str], ratio: float
) -> None:
    num_tokens = NUM_FRAMES["short"] * TOKENS_PER_FRAME
    text = answered(served["text"]).num_prompt_tokens + len("\n")
    kept = num_retained_tokens(num_tokens, ratio)
    assert kept == math.ceil(ratio * num_tokens)
    assert answered(served[ratio]).num_prompt_tokens == text + kept


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_the_engines_logits_are_those_of_the_original_weights(
    served: dict[str | float, Answer | str],
    clips: dict[str, Path],
    without_newline: Path,
    weights: Weights,
    ratio: float,
) -> None:
    rows = original.video_rows(weights, clip_pixels(clips["short"], without_newline))
    if ratio < 1:
        by_frame = rows.unflatten(0, (-1, TOKENS_PER_FRAME))
        rows = compress_as_served(by_frame, num_retained_tokens(len(rows), ratio)).tokens
    processor = AutoProcessor.from_pretrained(without_newline)
    content = [{"type": "video"}, {"type": "text", "text": "Why?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    video = LlavaOnevisionConfig.from_pretrained(without_newline).video_token_index
    ids = processor.tokenizer(text.replace("<video>", "<video>" * len(rows))).input_ids
    embeds = original.embedded(weights, torch.tensor(ids), video, rows)
    answer = answered(served[ratio])
    for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
        likeliest = original.logits(weights, embeds)[-1].log_softmax(-1).max(-1)
        assert token == int(likeliest.indices)
        assert logprob == pytest.approx(float(likeliest.values), abs=1e-4)
        embeds = torch.cat([embeds, weights[EMBEDDING][likeliest.indices][None]])


def clip_pixels(clip: Path, model: Path) -> Tensor:
    """Return what the tower gets of a clip of few frames, (T, 3, H, W)."""
    processor = AutoProcessor.from_pretrained(model).video_processor
    (pixels,) = processor(np.stack(decode_all(clip)), return_tensors="pt").pixel_values_videos
    return pixels


def test_an_image_to_a_model_without_newline_is_refused(
    served: dict[str | float, Answer | str],
) -> None:
    refusal = served["picture"]
    assert isinstance(refusal, str)
    assert "image" in refusal
    assert len(answered(served["text"]).tokens) == 8


def test_stock_vllm_serves_a_checkpoint_with_newline_and_answers_as_we_do_at_ratio_1(
    engines: None, with_newline: Path, clips: dict[str, Path]
) -> None:
    parts = (clips["short"], "Why?")
    (expected,) = chat(with_newline, [Chat(parts)], stock=True, **SERVED)
    (answer,) = chat(with_newline, [Chat(parts, 1.0)], **SERVED)
    assert largest_difference(answered(answer), answered(expected)) < 1e-4
