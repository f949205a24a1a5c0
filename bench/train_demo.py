"""Trains the demo model from random weights on synthetic clips, and writes it with its record.

    python -m bench.train_demo --output DIR [--seed 0] [--minutes-limit M]
        [--steps N] [--batch-size B] [--checkpoint DIR]

It runs on one GPU, or slowly on the CPU. Worker processes sample clips, and the device paints them.
Checkpoints are written to DIR during training. The learning rate follows the steps, or the time if
M minutes end first: a slow machine completes a shorter training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bench.demo_training import validation
from bench.demo_training.batches import (
    EXERCISE,
    STAGES,
    Batch,
    BatchMaker,
    Curriculum,
    batch_loader,
)
from bench.demo_training.card import CARD, RECORD, card
from bench.demo_training.forward import PackedModel
from bench.demo_training.lessons import PlaceReader, WordReader, length_penalty
from bench.demo_training.model import (
    ModelSize,
    build_model,
    build_tokenizer,
    load,
    save,
)
from bench.demo_training.packing import IGNORED, Encoder, PackedQuestions
from bench.demo_training.pixels import as_values, filmed, normalised
from bench.demo_training.places import drawn_places
from bench.demo_training.validation import Score, autocast, make_batches
from bench.world.questions import SKILLS, VOCABULARY
from bench.world.render import cover, render
from scissor_vllm.loadtest.record import environment

VALIDATION_SEED = 2**32
NUM_FINAL_CLIPS_PER_SKILL = 64
NUM_COMPRESSED_CLIPS_PER_SKILL = 24
RATIOS = (0.25, 0.1, 0.05)
METHODS = ("scc", "uniform")


@dataclass(frozen=True)
class Recipe:
    """Settings of the training."""

    seed: int = 0
    steps: int = 8800
    batch_size: int = 32
    minutes_limit: float = 19.5
    learning_rate: float = 1e-3
    final_learning_rate: float = 2e-5
    num_warmup_steps: int = 150
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_gradient_norm: float = 1.0
    row_length: int = 324
    """Tokens of questions about a clip. With the clip's tokens, 4 more than a multiple of 8, they
    are a multiple of 8, which masked attention needs to avoid a copy."""
    reading_weight: float = 1.0
    """Initial weight of the loss of naming what each token shows; it falls to 0."""
    where_weight: float = 0.3
    """Initial weight of the loss of locating each token; it falls to 0."""
    length_weight: float = 0.1
    """Weight of the loss that keeps the norm of a video's tokens near that of words."""
    place_weight: float = 0.1
    """Weight of tokens that show only background in the loss of naming; most tokens do."""
    seconds_for_the_end: float = 45.0
    """Part of the limit that is reserved for the last validation."""
    free_time: float = 0.1
    """Share of the time limit after which time counts. Before it only steps count, because the
    start is slow and steps are repeatable."""


@dataclass
class Progress:
    """Counts of the training so far."""

    step: int = 0
    num_clips: int = 0
    skill_losses: list[float] = field(default_factory=lambda: [math.nan] * len(SKILLS))
    curve: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    training_seconds: float = 0.0


class Trainer:
    """A model, its optimizer and the loop around them."""

    def __init__(
        self,
        recipe: Recipe,
        size: ModelSize,
        device: torch.device,
        start: float,
        *,
        compiled_num_frames: int | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Build the model.

        Args:
            recipe: settings of the training.
            size: the model's widths and depths.
            device: device of the training.
            start: begin of the recipe's time limit, by the monotonic clock.
            compiled_num_frames: see PackedModel.
            checkpoint: initial weights of the same size; random weights by default.
        """
        self.recipe, self.size, self.device, self.start = recipe, size, device, start
        self.tokenizer = build_tokenizer(VOCABULARY)
        self.encoder = Encoder(self.tokenizer.backend_tokenizer)
        hf_model = (
            load(checkpoint) if checkpoint else build_model(size, self.tokenizer, recipe.seed)
        )
        self.model = PackedModel(hf_model, self.encoder.prefix, compiled_num_frames)
        self.model.to(device)
        self.reader = WordReader(self.encoder).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.place_reader = PlaceReader(size.text_width, size.grid).to(device)
        self.optimizer = torch.optim.AdamW(
            self._groups(), lr=0.0, betas=recipe.betas, fused=device.type == "cuda"
        )
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.progress = Progress()
        self._loss_sums = torch.zeros(2, len(SKILLS) + 3, device=device)

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model."""
        return self.model.model

    def _groups(self) -> list[dict[str, Any]]:
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        parts = (self.model, self.reader, self.place_reader)
        for name, weight in (pair for part in parts for pair in part.named_parameters()):
            is_matrix = weight.ndim > 1 and "embed" not in name
            (decayed if is_matrix else others).append(weight)
        decay = self.recipe.weight_decay
        return [
            {"params": decayed, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def done(self) -> float:
        """Return the completed fraction of the training, by steps or by time."""
        limit = self.recipe.minutes_limit * 60 - self.recipe.seconds_for_the_end
        free = self.recipe.free_time
        time_spent = ((time.monotonic() - self.start) / max(limit, 1e-3) - free) / (1 - free)
        return min(1.0, max(self.progress.step / self.recipe.steps, time_spent))

    def learning_rate(self, done: float) -> float:
        """Return the learning rate: linear warm-up, constant until half of the training, cosine."""
        recipe = self.recipe
        falling = max(0.0, 2 * done - 1)
        warm = min(1.0, (self.progress.step + 1) / recipe.num_warmup_steps)
        span = recipe.learning_rate - recipe.final_learning_rate
        return warm * (recipe.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * falling)))

    def train_step(self, batch: Batch) -> None:
        """Do one optimizer step."""
        self.model.train()
        done = self.done()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(done)
        loss = self._loss(batch, done)
        loss.backward()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, self.recipe.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.num_clips += len(batch)

    def _loss(self, batch: Batch, done: float) -> torch.Tensor:
        scenes, questions = batch.scenes.to(self.device), batch.questions.to(self.device)
        pixels = normalised(filmed(as_values(render(scenes, self.device)), self.generator))
        classes = cover(scenes, self.size.grid, self.device)
        with autocast(self.device):
            tokens = self.model.video_tokens(pixels)
            places = drawn_places(tokens.shape[:3], self.generator)
            logits = self.model.logits(self.model(tokens.flatten(1, 2), questions, places))
        words = self.hf_model.get_input_embeddings().weight
        flat = tokens.flatten(0, 2)
        reading_loss = self.reader(flat, classes.flatten(), words, self.recipe.place_weight)
        where_loss = self.place_reader(tokens)
        token_losses = F.cross_entropy(
            logits.flatten(0, 1),
            questions.labels.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        losses = self._losses_of_skills(token_losses, questions)
        self._loss_sums[:, :-2] += losses.detach()
        reading = reading_loss.detach()
        self._loss_sums[0, -2:] += torch.stack([reading, where_loss.detach()])
        self._loss_sums[1, -2:] += 1
        # Some skills have ten times the questions of others: the root reduces the imbalance.
        shares = losses[1].sqrt()
        answer_loss = (losses[0] / losses[1].clamp(min=1) * shares).sum() / shares.sum()
        return (
            answer_loss
            + self.recipe.reading_weight * (1 - done) * reading_loss
            + self.recipe.where_weight * (1 - done) * where_loss
            + self.recipe.length_weight * length_penalty(flat, words)
        )

    @staticmethod
    def _losses_of_skills(losses: torch.Tensor, questions: PackedQuestions) -> torch.Tensor:
        """Return the sum of the tokens' losses and their number, (2, skills + 1)."""
        skills = questions.skills.flatten()
        is_answer = (questions.labels.flatten() != IGNORED).float()
        sums = torch.zeros(2, EXERCISE + 1, device=losses.device)
        return sums.index_add(1, skills, torch.stack([losses, is_answer]))

    def take_losses(self) -> dict[str, float]:
        """Return the mean losses since the last call: of skills, lessons and all answers.

        Losses are read rarely and together, because each read synchronizes with the device.
        """
        sums, counts = self._loss_sums.tolist()
        self._loss_sums.zero_()
        means = [s / c if c else math.nan for s, c in zip(sums, counts, strict=True)]
        self.progress.skill_losses = [
            new if math.isfinite(new) else old
            for new, old in zip(means, self.progress.skill_losses, strict=False)
        ]
        answer = sum(sums[: len(SKILLS)]) / max(sum(counts[: len(SKILLS)]), 1)
        names = (*SKILLS, "exercise", "reading", "where")
        return {**dict(zip(names, means, strict=True)), "answer": answer}


def plain(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return scores as plain dictionaries for JSON."""
    return {
        way: {skill: asdict(s) for skill, s in by_skill.items()} for way, by_skill in scores.items()
    }


class Run:
    """One training: its loop, its output and its files."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer) -> None:
        """Make the validation clips."""
        self.args, self.trainer = args, trainer
        self.tokenizer = trainer.tokenizer.backend_tokenizer
        count = args.validation_clips * len(SKILLS)
        self.batches = self._validation(range(VALIDATION_SEED, VALIDATION_SEED + count))
        self.final: dict[str, Any] = {}
        begun = args.checkpoint and args.checkpoint / RECORD
        self._before = json.loads(begun.read_text()) if begun and begun.exists() else None
        self._last_save = self._last_print = time.monotonic()
        self._printed_clips = 0

    def _validation(self, seeds: range) -> list[validation.ValidationBatch]:
        size = self.trainer.recipe.batch_size
        return make_batches(self.tokenizer, seeds, size, num_frames=self.args.num_frames)

    def train(self, batches: Iterator[Batch], curriculum: Curriculum) -> None:
        """Train to the last step or to the time limit."""
        trainer, args = self.trainer, self.args
        begin = time.monotonic()
        for batch in batches:
            trainer.train_step(batch)
            curriculum.done = trainer.done()
            step, is_last = trainer.progress.step, curriculum.done >= 1.0
            if step % args.print_every == 0 or is_last:
                self._print_losses()
                if not args.no_adaptive_shares:
                    curriculum.favour(trainer.progress.skill_losses)
            if step % args.validate_every == 0:
                self._validate()
            if time.monotonic() - self._last_save > args.save_seconds:
                self._save()
            if is_last:
                break
        trainer.progress.training_seconds = time.monotonic() - begin

    def finish(self) -> None:
        """Write the last checkpoint, validate it from disk, write the record and the card."""
        self._save()
        trainer, device = self.trainer, self.trainer.device
        saved = PackedModel(load(self.args.output), trainer.encoder.prefix).to(device)
        del trainer.optimizer
        batches = self._final_batches(self.args.compressed_clips)
        ways = validation.compressors(METHODS, RATIOS)
        final = validation.accuracy(saved, self._final_batches(self.args.final_clips), device)
        print(f"saved model: {_line(final['whole'])}", flush=True)
        compressed = validation.accuracy(saved, batches, device, ways)
        for name, scores in compressed.items():
            print(f"  {name:14} {_line(scores)}", flush=True)
        self.final = {
            "final_validation": plain(final),
            "compressed_validation": plain(compressed),
            "similarity": validation.similarity(saved, batches[:4], device),
            "num_validation_clips": self.args.final_clips * len(SKILLS),
            "num_compressed_clips": self.args.compressed_clips * len(SKILLS),
        }
        print(json.dumps(self.final["similarity"], indent=1), flush=True)
        self._save()

    def _final_batches(self, clips_per_skill: int) -> list[validation.ValidationBatch]:
        return self._validation(
            range(VALIDATION_SEED, VALIDATION_SEED + clips_per_skill * len(SKILLS))
        )

    def _print_losses(self) -> None:
        trainer, now = self.trainer, time.monotonic()
        losses = trainer.take_losses()
        clips = trainer.progress.num_clips
        rate = (clips - self._printed_clips) / max(now - self._last_print, 1e-9)
        self._printed_clips, self._last_print = clips, now
        lr = trainer.learning_rate(trainer.done())
        rounded = {name: round(loss, 4) for name, loss in losses.items() if math.isfinite(loss)}
        trainer.progress.curve.append({"step": trainer.progress.step, "lr": lr, **rounded})
        skills = " ".join(f"{skill} {losses[skill]:.2f}" for skill in SKILLS)
        print(
            f"{now - trainer.start:6.0f} s  step {trainer.progress.step:5}  {rate:6.1f} clips/s  "
            f"lr {lr:.1e}  reading {losses['reading']:.3f}  where {losses['where']:.3f}  "
            f"exercise {losses['exercise']:.3f}  "
            f"answer {losses['answer']:.4f}  ({skills})",
            flush=True,
        )

    def _validate(self) -> None:
        scores = validation.accuracy(self.trainer.model, self.batches, self.trainer.device)["whole"]
        shares = {skill: score.accuracy for skill, score in scores.items() if score.num_asked}
        self.trainer.progress.validations.append({"step": self.trainer.progress.step, **shares})
        print(f"          validation: {_line(scores)}", flush=True)
        self._last_print = time.monotonic()

    def _save(self) -> None:
        record = self._record()
        texts = {RECORD: json.dumps(record, indent=1) + "\n"}
        if self.final:
            texts[CARD] = card(record)
        save(self.trainer.hf_model, self.trainer.tokenizer, self.args.output, texts)
        self._last_save = time.monotonic()

    def _record(self) -> dict[str, Any]:
        trainer, progress = self.trainer, self.trainer.progress
        num_parameters = sum(weight.numel() for weight in trainer.hf_model.parameters())
        return {
            "command": shlex.join(["python", "-m", "bench.train_demo", *sys.argv[1:]]),
            "seed": trainer.recipe.seed,
            "batch_size": trainer.recipe.batch_size,
            "recipe": asdict(trainer.recipe),
            "model": {
                "size": asdict(trainer.size),
                "tokens_per_frame": trainer.size.tokens_per_frame,
                "num_parameters": num_parameters,
                "weights_bytes": 2 * num_parameters,
            },
            "num_steps": progress.step,
            "num_clips": progress.num_clips,
            "seconds": time.monotonic() - trainer.start,
            "training_seconds": progress.training_seconds,
            "environment": environment(),
            "units": {"curve": "mean cross entropy in nats a token", "seconds": "wall clock"},
            "before": self._before,
            "curve": progress.curve,
            "validations": progress.validations,
            **self.final,
        }


def _line(scores: dict[str, Score]) -> str:
    shares = [score.accuracy for score in scores.values() if score.num_asked]
    mean = sum(shares) / max(len(shares), 1)
    return f"mean {mean:.3f}  " + " ".join(f"{s} {v.accuracy:.2f}" for s, v in scores.items())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command's options."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the checkpoint; replaced")
    add("--seed", type=int, default=recipe.seed)
    add("--steps", type=int, default=recipe.steps)
    add("--batch-size", type=int, default=recipe.batch_size)
    add("--minutes-limit", type=float, default=recipe.minutes_limit, help="of all, start to end")
    add("--learning-rate", type=float, default=recipe.learning_rate)
    add("--row-length", type=int, default=recipe.row_length, help="question tokens a clip")
    add("--checkpoint", type=Path, help="to begin with, on whole clips; by default random weights")
    add("--size", nargs="*", default=[], metavar="FIELD=INTEGER", help="of ModelSize")
    add("--num-frames", type=int, default=16, help="of validation clips, and of the longest")
    add("--num-workers", type=int, default=max(0, min(14, len(os.sched_getaffinity(0)) - 2)))
    add("--compile", action="store_true", help="compile the layers: slower start, faster steps")
    add("--no-adaptive-shares", action="store_true", help="all skills weigh alike throughout")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--print-every", type=int, default=50, help="steps")
    add("--validate-every", type=int, default=300, help="steps")
    add("--validation-clips", type=int, default=16, help="a skill, while training")
    add("--final-clips", type=int, default=NUM_FINAL_CLIPS_PER_SKILL, help="a skill")
    add("--compressed-clips", type=int, default=NUM_COMPRESSED_CLIPS_PER_SKILL, help="a skill")
    add("--save-seconds", type=float, default=60.0, help="between checkpoints")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    start = time.monotonic()
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    # If a layer does not compile, training is slower, but it goes on.
    torch._dynamo.config.suppress_errors = True
    # cuDNN's attention makes a plan for every shape, and validation has many.
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = torch.device(args.device)
    size = ModelSize().changed(args.size)
    recipe = Recipe(
        seed=args.seed,
        steps=args.steps,
        batch_size=args.batch_size,
        minutes_limit=args.minutes_limit,
        learning_rate=args.learning_rate,
        row_length=args.row_length,
        num_warmup_steps=min(Recipe.num_warmup_steps, max(1, args.steps // 10)),
    )
    stages = () if args.checkpoint else STAGES
    curriculum = Curriculum(
        recipe.seed, recipe.batch_size, recipe.steps, args.num_frames, stages=stages
    )
    backend = build_tokenizer(VOCABULARY).backend_tokenizer
    loader = batch_loader(BatchMaker(backend, recipe.row_length), curriculum, args.num_workers)
    # Workers are forked here, because a forked process cannot use an existing CUDA context.
    batches = iter(loader)
    compiled = args.num_frames if args.compile else None
    trainer = Trainer(
        recipe, size, device, start, compiled_num_frames=compiled, checkpoint=args.checkpoint
    )
    flops = size.flops_per_clip(args.num_frames, recipe.row_length)
    count = sum(weight.numel() for weight in trainer.hf_model.parameters())
    print(f"{count / 1e6:.2f} million parameters, {flops / 1e9:.0f} GFLOP a clip", flush=True)
    run = Run(args, trainer)
    run.train(batches, curriculum)
    run.finish()


if __name__ == "__main__":
    main()
