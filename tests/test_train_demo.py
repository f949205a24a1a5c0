"""The demo model's training: its inputs equal a server's, and its record is correct."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from bench import train_demo
from bench.demo_training import validation
from bench.demo_training.batches import EXERCISE, BatchMaker, BatchPlan, Curriculum, casual
from bench.demo_training.card import card
from bench.demo_training.forward import PackedModel
from bench.demo_training.lessons import PlaceReader, WordReader, length_penalty, note, ways
from bench.demo_training.model import ModelSize, build_model, build_tokenizer, load, save
from bench.demo_training.packing import (
    IGNORED,
    NO_QUESTION,
    EncodedQuestion,
    Encoder,
    pack,
    question_mask,
)
from bench.demo_training.pixels import as_values, filmed, normalised
from bench.demo_training.places import (
    SMALLEST_STEP,
    USUAL_SHARE,
    drawn_places,
    usual_places,
)
from bench.world.questions import SKILLS, VOCABULARY, Question, ask
from bench.world.render import NUM_CLASSES, class_of, cover, render
from bench.world.render import pack as pack_scenes
from bench.world.scene import sample_scene

TINY = (
    "vision_width=64",
    "vision_layers=2",
    "vision_heads=2",
    "vision_mlp=96",
    "text_width=64",
    "text_layers=2",
    "text_heads=2",
    "text_mlp=96",
)
CPU = torch.device("cpu")
EVEN = (1.0,) * len(SKILLS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The demo's tokenizer."""
    return build_tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with random weights that are far from all alike."""
    model = build_model(ModelSize().changed(TINY), tokenizer, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("model") / "tiny"
    save(model, tokenizer, path, {})
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """That model as Hugging Face loads it."""
    return load(folder).eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    """Its saved processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    """The packing's encoder."""
    return Encoder(tokenizer.backend_tokenizer)


def prompt_of(processor: Any, frames: np.ndarray, text: str) -> Any:
    """Return what a server makes of a clip and a question, up to where the answer begins."""
    content = [{"type": "video"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return processor(text=prompt, videos=[frames], return_tensors="pt")


# The tokenizer


@pytest.mark.parametrize("text", ["", "what  colour ?\n\n A red", "Größe ☃\t<0x41>", "\x00 </s> x"])
def test_every_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_word_of_the_world_is_one_token_wherever_it_stands(tokenizer: Any) -> None:
    for word in VOCABULARY:
        for form in (word, f" {word}"):
            assert len(tokenizer(form)["input_ids"]) == 1, form


def test_questions_written_casually_take_no_more_tokens(tokenizer: Any) -> None:
    for question in ask(sample_scene(3), 3):
        plain, written = (
            tokenizer(text)["input_ids"] for text in (question.text, casual(question.text))
        )
        assert len(written) <= len(plain)


# Fresh weights


def test_a_new_model_attends_to_equal_tokens_and_to_the_previous_token(tokenizer: Any) -> None:
    text = build_model(ModelSize(), tokenizer, seed=0).model.language_model
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 40, 256, generator=generator)
    states[0, 30] = states[0, 10]
    positions = torch.arange(40)[None]
    cos, sin = text.rotary_emb(states, positions)

    def scores(layer: int) -> torch.Tensor:
        """Return attention before the softmax, (heads, 40, 40)."""
        attention = text.layers[layer].self_attn
        query, key = (
            projection(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return (query @ key.transpose(2, 3))[0] * attention.scaling

    for layer in (0, 1):
        before = scores(layer)[0].tril().masked_fill(~torch.ones(40, 40).tril().bool(), -99)
        assert before[1:].diagonal().mean() > before.diagonal().mean()
        assert before[1:].diagonal().mean() > before[5:].diagonal().mean() + 2
    alike = scores(3)[:, 30]
    others = [index for index in range(30) if index != 10]
    assert alike[:, 10].mean() > alike[:, others].mean() + 1


# The packed forward pass


@pytest.mark.parametrize("num_frames", [1, 3])
def test_packed_logits_are_those_of_each_question_asked_alone(
    model: Any, processor: Any, encoder: Encoder, num_frames: int
) -> None:
    scenes = [sample_scene(seed, None, num_frames) for seed in (0, 1)]
    frames = render(scenes, CPU)
    asked = [ask(scene, seed)[:5] for seed, scene in enumerate(scenes)]
    rows = [
        [encoder(question.text, question.answer, 0) for question in questions]
        for questions in asked
    ]
    questions, num_left_out = pack(rows, 200, encoder.padding)
    assert num_left_out == 0
    packed = PackedModel(model, encoder.prefix).eval()
    with torch.no_grad():
        video = packed.video_tokens(normalised(as_values(frames))).flatten(1, 2)
        logits = packed.logits(packed(video, questions))
    for row, clip in enumerate(asked):
        for index, question in enumerate(clip):
            prompt = prompt_of(processor, frames[row].numpy(), question.text)
            answer = processor.tokenizer(question.answer + "<|im_end|>", return_tensors="pt")
            ids = torch.cat([prompt["input_ids"], answer["input_ids"]], dim=1)
            with torch.no_grad():
                alone = model(input_ids=ids, pixel_values_videos=prompt["pixel_values_videos"])
            where = questions.questions[row] == index
            num_own = int(where.sum())
            assert ids[0, -num_own - 1 : -1].tolist() == questions.tokens[row][where].tolist()
            torch.testing.assert_close(
                logits[row][where], alone.logits[0, -num_own - 1 : -1], rtol=1e-3, atol=1e-3
            )
            to_predict = questions.labels[row][where]
            num_answer = answer["input_ids"].shape[1]
            assert to_predict[-num_answer:].tolist() == answer["input_ids"][0].tolist()
            assert (to_predict[:-num_answer] == IGNORED).all()


def test_drawn_positions_begin_at_zero_increase_and_include_the_served_ones() -> None:
    shape = torch.Size((400, 4, 30))
    places = drawn_places(shape, torch.Generator().manual_seed(0))
    assert places.shape == (400, 120)
    assert (places[:, 0] == 0).all()
    assert (places.diff(dim=1) >= 0).all()
    is_usual = (places == usual_places(120, CPU)).all(1)
    assert is_usual.float().mean() == pytest.approx(USUAL_SHARE, abs=0.07)
    steps = places[~is_usual, -1] / 119
    assert steps.min() < 2 * SMALLEST_STEP
    assert steps.max() > 0.5
    # Frames of a clip are of unlike length, as compression leaves them.
    frames = places[~is_usual].unflatten(1, (4, 30))
    lengths = frames[..., -1] - frames[..., 0]
    assert (lengths.amax(1) > 1.5 * lengths.amin(1)).float().mean() > 0.7


def test_places_tell_what_comes_before_and_the_question_follows_the_last(
    model: Any, encoder: Encoder
) -> None:
    packed = PackedModel(model, encoder.prefix).eval()
    questions, _ = pack([[encoder("read the sign .", "a", 0)]], 20, encoder.padding)
    video = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    video = video.repeat(1, 1, model.config.text_config.hidden_size // 32)
    usual = usual_places(6, CPU)[None]
    with torch.no_grad():
        default, same, other = (
            packed(video, questions, places) for places in (None, usual, usual / 2)
        )
    torch.testing.assert_close(default, same)
    assert not torch.allclose(default, other, atol=1e-4)


def test_the_clip_stands_before_the_question_as_the_processor_puts_it(
    processor: Any, encoder: Encoder
) -> None:
    frames = render([sample_scene(0, None, 2)], CPU)[0].numpy()
    ids = prompt_of(processor, frames, "where are you ?")["input_ids"][0].tolist()
    num_video = ids.count(encoder.video)
    assert num_video == 2 * ModelSize().tokens_per_frame + 1
    assert ids[: len(encoder.prefix) + num_video] == [*encoder.prefix, *[encoder.video] * num_video]


def test_pixels_are_those_of_the_saved_processor(processor: Any) -> None:
    frames = render([sample_scene(5, None, 2)], CPU)
    expected = prompt_of(processor, frames[0].numpy(), "")["pixel_values_videos"]
    torch.testing.assert_close(normalised(as_values(frames)), expected, rtol=0, atol=1e-5)


def test_a_question_sees_the_clip_and_its_own_past_alone() -> None:
    mask = question_mask(torch.tensor([[0, 0, 1, 1, NO_QUESTION]]), num_shared=2)[0, 0]
    assert mask[:, :2].all()
    assert mask[:, 2:].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_a_question_without_room_is_left_out_whole() -> None:
    long = EncodedQuestion(tuple(range(1, 8)), 2, 0)
    short = EncodedQuestion((8, 9, 10), 2, 1)
    questions, num_left_out = pack([[long, long, short]], 9, padding=0)
    assert num_left_out == 1
    assert questions.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 8, 9, 0]]
    assert questions.labels[0, 4:].tolist() == [6, 7, 9, 10, IGNORED]
    assert questions.offsets.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 0]]


def test_fewer_key_heads_are_refused(model: Any) -> None:
    heads = model.config.text_config.num_key_value_heads
    model.config.text_config.num_key_value_heads = 1
    try:
        with pytest.raises(ValueError, match="as many key heads"):
            PackedModel(model, (1,))
    finally:
        model.config.text_config.num_key_value_heads = heads


# Batches


def test_equal_plans_make_equal_batches(tokenizer: Any) -> None:
    maker = BatchMaker(tokenizer.backend_tokenizer, 120)
    plan = BatchPlan(range(7, 10), 8, EVEN)
    first, second = maker[plan], maker[plan]
    assert torch.equal(first.questions.tokens, second.questions.tokens)
    assert torch.equal(render(first.scenes, CPU), render(second.scenes, CPU))
    assert (first.questions.labels != IGNORED).any(dim=1).all()


def test_no_clip_is_trained_on_twice_nor_taken_from_another_split() -> None:
    from bench.world.heldout import SEEDS

    curriculum = Curriculum(seed=3, batch_size=4, num_batches=50)
    seeds: list[int] = []
    for step, plan in enumerate(curriculum):
        curriculum.done = step / 50
        seeds += plan.seeds
    assert len(set(seeds)) == len(seeds) > 200
    assert all(seed in SEEDS["train"] for seed in seeds)
    assert SEEDS["validation"].start == train_demo.VALIDATION_SEED


def test_skills_that_lag_get_a_larger_share(tokenizer: Any) -> None:
    curriculum = Curriculum(seed=0, batch_size=1, num_batches=1)
    losses = [0.1] * len(SKILLS)
    losses[SKILLS.index("glyph")] = 2.0
    curriculum.favour(losses)
    weights = dict(zip(SKILLS, curriculum.skill_weights, strict=True))
    assert weights.pop("glyph") > 2 * max(weights.values())
    maker = BatchMaker(tokenizer.backend_tokenizer, 120)

    def num_glyphs(weights: Sequence[float]) -> int:
        questions = maker[BatchPlan(range(60), 16, tuple(weights))].questions
        is_answer = questions.labels != IGNORED
        return int((questions.skills[is_answer] == SKILLS.index("glyph")).sum())

    assert num_glyphs(curriculum.skill_weights) > num_glyphs(EVEN)


def test_clips_grow_longer_and_exercises_fewer(tokenizer: Any) -> None:
    curriculum = Curriculum(seed=0, batch_size=2, num_batches=300)
    plans = []
    for step, plan in enumerate(curriculum):
        curriculum.done = step / 300
        plans.append(plan)
    assert plans[0].num_frames == 1
    assert {plan.num_frames for plan in plans[:60]} == {1}
    late = [plan.num_frames for plan in plans[200:]]
    assert max(late) == 16
    assert late.count(16) > 0.7 * len(late)
    maker = BatchMaker(tokenizer.backend_tokenizer, 120)
    early, last = (maker[plan].questions for plan in (plans[0], plans[-1]))
    assert (early.skills == EXERCISE).any()
    assert not (last.skills == EXERCISE).any()


def test_a_note_leaves_nothing_between_what_is_named_and_the_answer(
    tokenizer: Any, encoder: Encoder
) -> None:
    question = Question("attribute", "what colour is the star ?", "green")
    written = note(encoder, question, EXERCISE)
    assert tokenizer.decode(written.tokens) == " colour star green"
    assert written.num_answer_tokens == 1


def test_notes_of_unlike_questions_stay_unlike(encoder: Encoder) -> None:
    """Of all that a scene is asked, what two notes share they share in the answer too."""
    for seed in range(60):
        scene = sample_scene(seed)
        answers: dict[tuple[int, ...], str] = {}
        for question in ask(scene, seed):
            if not question.choices:
                tokens = note(encoder, question, 0)
                asked = tokens.tokens[: -tokens.num_answer_tokens]
                assert answers.setdefault(asked, question.answer) == question.answer


def test_the_way_between_two_things_is_the_one_that_is_painted(
    tokenizer: Any, encoder: Encoder
) -> None:
    """By where their tokens lie in the picture."""
    grid, told = 22, Counter[str]()
    for seed in range(40):
        scene = sample_scene(seed, num_frames=1)
        shown = cover([scene], grid, CPU)[0, 0]
        middle = {
            f"{thing.colour} {thing.figure}": torch.nonzero(shown == class_of(thing))
            .float()
            .mean(0)
            for thing in scene.things
        }
        for way in ways(encoder, scene, EXERCISE):
            start, *names, answer = tokenizer.decode(way.tokens).split()
            assert start == "way"
            first, second = (middle[" ".join(pair)] for pair in (names[:2], names[2:]))
            down, across = (second - first).tolist()
            sides = {"left": -across, "right": across, "up": -down, "down": down}
            assert answer == max(sides, key=sides.__getitem__)
            told[answer] += 1
    assert set(told) == {"left", "right", "up", "down"}
    assert min(told.values()) > 10
    assert not list(ways(encoder, sample_scene(0, num_frames=4), EXERCISE))


def test_tokens_that_lie_near_their_words_are_read_rightly(encoder: Encoder) -> None:
    reader = WordReader(encoder)
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(900, 256, generator=generator)
    classes = torch.arange(NUM_CLASSES)
    near = torch.zeros(NUM_CLASSES, 256)
    for form in ("inside", "first"):
        near += words[reader.get_buffer(f"figures_{form}")[reader.get_buffer("figure")]]
        colour = reader.get_buffer("colour")
        shade = words[reader.get_buffer(f"colours_{form}")[colour.clamp(min=0)]]
        near += torch.where(colour[:, None] >= 0, shade, 0.0)
    right = reader(near, classes, words, place_weight=1.0)
    wrong = reader(near.roll(9, 0), classes, words, place_weight=1.0)
    assert right < 1.0
    assert wrong > 2.0


def test_a_token_is_located_by_its_values_only() -> None:
    torch.manual_seed(0)
    reader = PlaceReader(8, 3)
    token = torch.zeros(9, 8)
    token[torch.arange(9), torch.arange(9) // 3] = 1.0
    token[torch.arange(9), 3 + torch.arange(9) % 3] = 1.0
    with torch.no_grad():
        for linear, first in ((reader.row, 0), (reader.column, 3)):
            linear.weight.zero_()
            linear.weight[torch.arange(3), first + torch.arange(3)] = 20.0
    told = token.expand(2, 4, 9, 8)
    assert reader(told) < 1e-3
    # Moved to other places, the same tokens tell wrong ones; alike, they tell nothing.
    assert reader(told.roll(1, dims=2)) > 1
    assert reader(torch.ones(2, 4, 9, 8)) >= math.log(3) - 1e-3


def test_tokens_with_the_norm_of_words_have_no_length_penalty() -> None:
    words = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    alike = torch.full((3, 64), float(words.norm(dim=-1).mean()) / 8)
    assert length_penalty(alike, words) == pytest.approx(0.0, abs=1e-6)
    assert length_penalty(alike * 10, words) == pytest.approx(math.log(10) ** 2, rel=1e-4)
    assert length_penalty(alike / 10, words) == pytest.approx(math.log(10) ** 2, rel=1e-4)


def test_an_unknown_loss_changes_no_share() -> None:
    curriculum = Curriculum(seed=0, batch_size=1, num_batches=1)
    curriculum.favour([math.nan, *[0.2] * (len(SKILLS) - 1)])
    assert curriculum.skill_weights == pytest.approx(EVEN)


# A camera's and a codec's faults


def test_filming_changes_pixels_a_little_and_repeatably() -> None:
    values = as_values(render([sample_scene(seed, None, 2) for seed in range(6)], CPU))
    first, second = (filmed(values, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    difference = (first - values).abs().mean(dim=(1, 2, 3, 4))
    assert (difference > 0).all()
    assert (difference < 0.06).all()


# Validation


def test_an_answer_is_right_when_greedy_decoding_gives_it(
    model: Any, processor: Any, encoder: Encoder
) -> None:
    packed = PackedModel(model, encoder.prefix)
    for seed in range(3):
        scene = sample_scene(seed, "attribute", 2)
        question = ask(scene, seed, "attribute")[0]
        prompt = prompt_of(processor, render([scene], CPU)[0].numpy(), question.text)
        generated = model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=-1)
        answer_ids = tuple(generated[0, prompt["input_ids"].shape[1] :].tolist())
        asked = encoder(question.text, "", SKILLS.index("attribute")).tokens[:-1]
        wrong_ids = (*answer_ids[:-1], answer_ids[-1] ^ 1)
        right, wrong = (
            EncodedQuestion((*asked, *answer), len(answer), SKILLS.index("attribute"))
            for answer in (answer_ids, wrong_ids)
        )
        questions, _ = pack([[right, wrong, right]], 150, encoder.padding)
        batch = validation.ValidationBatch(pack_scenes([scene]), questions)
        scores = validation.accuracy(packed, [batch], CPU)["whole"]
        assert scores["attribute"] == validation.Score(num_right=2, num_asked=3)


def test_compressed_clips_are_judged_by_the_packages_methods(
    model: Any, tokenizer: Any, encoder: Encoder
) -> None:
    packed = PackedModel(model, encoder.prefix)
    batches = validation.make_batches(
        tokenizer.backend_tokenizer, range(2), num_frames=2, batch_size=2
    )
    ways = validation.compressors(["scc", "uniform"], [0.1])
    assert ways["scc 0.1"](torch.randn(2, 100, 8)).shape == (20, 8)
    scores = validation.accuracy(packed, batches, CPU, ways)
    assert list(scores) == ["whole", "scc 0.1", "uniform 0.1"]
    asked = {sum(score.num_asked for score in by_skill.values()) for by_skill in scores.values()}
    assert len(asked) == 1
    assert asked.pop() > 0


def test_similarity_of_a_still_clip_is_one_in_time(model: Any, encoder: Encoder) -> None:
    packed = PackedModel(model, encoder.prefix)
    scene = next(
        scene
        for scene in (sample_scene(seed, "small", 3) for seed in range(9))
        if scene.is_still and all(thing.direction == "still" for thing in scene.sprites)
    )
    questions, _ = pack([[]], 8, encoder.padding)
    batch = validation.ValidationBatch(pack_scenes([scene]), questions)
    summary = validation.similarity(packed, [batch], CPU)
    assert summary["cosine of neighbours in time"] == pytest.approx([1.0] * 5, abs=1e-3)
    assert summary["cosine of any two in a frame"][0] < 0.999


# What is saved


def test_the_demos_weights_fit_a_repository(tokenizer: Any) -> None:
    with torch.device("meta"):
        model = build_model(ModelSize(), tokenizer, seed=0)
    assert 2 * sum(weight.numel() for weight in model.parameters()) < 24e6


def test_a_checkpoint_is_bfloat16_named_as_on_the_hub_and_replaced_whole(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = build_model(ModelSize().changed(TINY), tokenizer, seed=0)
    save(model, tokenizer, tmp_path / "it", {"old.txt": "old"})
    save(model, tokenizer, tmp_path / "it", {"new.txt": "new"})
    assert {path.name for path in tmp_path.iterdir()} == {"it"}
    assert (tmp_path / "it/new.txt").read_text() == "new"
    assert not (tmp_path / "it/old.txt").exists()
    with safe_open(tmp_path / "it/model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("image_newline").dtype == torch.bfloat16
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    loaded = load(tmp_path / "it").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight.bfloat16().float()), name


def test_pictures_and_plain_text_run_too(model: Any, processor: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    inputs = processor(text="<|im_start|>user\n<image>", images=[picture], return_tensors="pt")
    for batch in (inputs, processor(text="what is this ?", return_tensors="pt")):
        assert torch.isfinite(model(**batch).logits).all()


# A whole run

COMMAND = (
    *("--steps=4", "--batch-size=2", "--num-frames=2", "--num-workers=0", "--device=cpu"),
    *("--row-length=96", "--print-every=2", "--validate-every=2", "--minutes-limit=30"),
    *("--validation-clips=1", "--final-clips=1", "--compressed-clips=1", "--size", *TINY),
)


@pytest.mark.slow
def test_a_run_leaves_a_model_its_record_and_its_card(tmp_path: Path) -> None:
    train_demo.main(["--output", str(tmp_path / "a"), "--seed=5", *COMMAND])
    train_demo.main(["--output", str(tmp_path / "b"), "--seed=5", *COMMAND])
    train_demo.main(["--output", str(tmp_path / "c"), "--seed=6", *COMMAND])
    first, second, other = (load(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not all(torch.equal(weight, other[name]) for name, weight in first.items())
    record = json.loads((tmp_path / "a/training.json").read_text())
    assert (record["seed"], record["num_steps"], record["num_clips"]) == (5, 4, 10)
    assert record["environment"]["versions"]["torch"]
    assert [point["step"] for point in record["curve"]] == [2, 4]
    assert record["validations"][0]["step"] == 2
    assert set(record["compressed_validation"]) == {
        "whole",
        *(f"{method} {ratio}" for method in ("scc", "uniform") for ratio in (0.25, 0.1, 0.05)),
    }
    assert (tmp_path / "a/README.md").read_text() == card(record)


def test_the_card_says_what_the_record_says(tmp_path: Path) -> None:
    train_demo.main(["--output", str(tmp_path / "a"), *COMMAND])
    record = json.loads((tmp_path / "a/training.json").read_text())
    assert (record["seed"], record["num_steps"], record["num_clips"]) == (0, 4, 10)
    assert record["environment"]["versions"]["torch"]
    assert (tmp_path / "a/README.md").read_text() == card(record)
    assert load(tmp_path / "a").state_dict()
    record["final_validation"]["whole"]["count"] = {"num_right": 7, "num_asked": 8}
    text = card(record)
    assert "| count | 87.5 % |" in text
    assert "4 steps of 2 clips or more, 10 clips in all; seed 0" in text
    assert "apache-2.0" in text


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_on_whole_clips_and_keeps_its_record(
    tmp_path: Path,
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train_demo.main(["--output", str(first), "--seed=5", *COMMAND])
    continued = ("--checkpoint", str(first), "--minutes-limit=0.01")
    train_demo.main(["--output", str(second), "--seed=6", *COMMAND, *continued])
    record = json.loads((second / "training.json").read_text())
    assert record["before"] == json.loads((first / "training.json").read_text())
    assert record["num_clips"] == 2
    text = (second / "README.md").read_text()
    assert text.index("seed 5") < text.index("Gone on from there") < text.index("seed 6")
    begun, weights = load(first).state_dict(), load(second).state_dict()
    change = max((weights[name] - weight).abs().max() for name, weight in begun.items())
    assert 0 < change < 0.01
    config = json.loads((second / "config.json").read_text())
    assert "dtype" not in config["text_config"]


def test_a_time_limit_ends_a_run_early(tmp_path: Path) -> None:
    train_demo.main(["--output", str(tmp_path / "a"), *COMMAND, "--minutes-limit=0.01"])
    assert json.loads((tmp_path / "a/training.json").read_text())["num_steps"] == 1


def test_training_lowers_the_loss_on_what_it_sees(tokenizer: Any) -> None:
    recipe = train_demo.Recipe(steps=40, batch_size=4, num_warmup_steps=4, row_length=96)
    trainer = train_demo.Trainer(recipe, ModelSize().changed(TINY), CPU, time.monotonic())
    batch = BatchMaker(tokenizer.backend_tokenizer, 96)[BatchPlan(range(4), 2, EVEN)]
    trainer.train_step(batch)
    before = trainer.take_losses()
    for _ in range(29):
        trainer.train_step(batch)
    trainer.take_losses()
    trainer.train_step(batch)
    after = trainer.take_losses()
    assert after["answer"] < 0.5 * before["answer"]
    assert after["reading"] < before["reading"]
