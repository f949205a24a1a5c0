"""Exercises that only training has: each teaches one step of an answer by itself.

A question is answered in steps: know what a token shows, find what the question names among
hundreds of tokens, read a feature off it, and say it where the answer begins. From questions alone
no step pays before the others are there, and training stands still for long.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bench.demo_training.packing import EncodedQuestion, Encoder
from bench.world.questions import Question
from bench.world.scene import COLOURS, GLYPHS, PLACES, SHAPES, Scene

_FUNCTION_WORDS = (
    *("a", "are", "can", "do", "does", "for", "have", "in", "is", "it", "of", "on", "or", "see"),
    *("tell", "that", "the", "there", "thing", "to", "what", "which", "you", "?", ".", ","),
)


def note(encoder: Encoder, question: Question, skill: int) -> EncodedQuestion:
    """Return a question without choices as a note: "colour star green".

    Nothing lies between what is named and what is read off it.
    """
    words = [word for word in question.text.split() if word not in _FUNCTION_WORDS]
    return encoder.continued("".join(f" {word}" for word in words), f" {question.answer}", skill)


CLEARLY = 2.0
"""Least ratio of the distances along both axes at which a direction is one of four."""


def ways(encoder: Encoder, scene: Scene, skill: int) -> Iterator[EncodedQuestion]:
    """Yield the direction between any two things of a picture: "way red star blue ring left".

    Motion is a change of place. One frame can teach places at a tenth of the cost of a clip.
    Things that are neither clearly beside nor clearly above each other are left out.

    Args:
        encoder: of the words.
        scene: of one frame; of others there is nothing.
        skill: that the exercises count as.
    """
    if scene.num_frames > 1:
        return
    for one, other in permutations(scene.things, 2):
        across, down = (b - a for a, b in zip(one.centre(0), other.centre(0), strict=True))
        if abs(across) >= CLEARLY * abs(down):
            way = "right" if across > 0 else "left"
        elif abs(down) >= CLEARLY * abs(across):
            way = "down" if down > 0 else "up"
        else:
            continue
        text = f" way {one.colour} {one.figure} {other.colour} {other.figure}"
        yield encoder.continued(text, f" {way}", skill)


class WordReader(nn.Module):
    """Says in the language model's own words what each token of a video shows.

    It is trained with the tower: tokens come to lie near the words for what they show, so that the
    language model finds them by these words. Thrown away afterwards; the words' vectors are the
    model's.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Take the encoder that tells which tokens the words are."""
        super().__init__()
        things = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        names: list[tuple[str, str | None]] = [(place, None) for place in PLACES]
        names += [*things, *((glyph, None) for glyph in GLYPHS)]
        figures = (*PLACES, *SHAPES, *GLYPHS)
        # A word is one token inside a text and another where an answer begins.
        for before, form in ((" ", "inside"), ("", "first")):
            for kind, words in (("figures", figures), ("colours", COLOURS)):
                tokens = [encoder.token(f"{before}{word}") for word in words]
                self.register_buffer(f"{kind}_{form}", torch.tensor(tokens), persistent=False)
        figure = [figures.index(name) for name, _ in names]
        colour = [COLOURS.index(colour) if colour else -1 for _, colour in names]
        self.register_buffer("figure", torch.tensor(figure), persistent=False)
        self.register_buffer("colour", torch.tensor(colour), persistent=False)
        # A token lies near four words at once, so that its cosine to each is a half at best.
        self.sharpness = nn.Parameter(torch.tensor(20.0))
        self.num_places = len(PLACES)

    def forward(
        self, tokens: torch.Tensor, classes: torch.Tensor, words: torch.Tensor, place_weight: float
    ) -> torch.Tensor:
        """Return the mean loss of reading what tokens show.

        Args:
            tokens: (N, D), of videos.
            classes: (N,) int64, ids of `bench.world.render.cover`.
            words: (V, D), the vectors of all words.
            place_weight: of tokens that show but a place; most do.
        """
        unit = F.normalize(tokens.float(), dim=-1)
        figure = self.get_buffer("figure")[classes]
        colour = self.get_buffer("colour")[classes]
        weight = torch.where(classes < self.num_places, place_weight, 1.0)
        total = torch.zeros((), device=tokens.device)
        for form in ("inside", "first"):
            for kind, target in (("figures", figure), ("colours", colour)):
                chosen = self.get_buffer(f"{kind}_{form}")
                vectors = F.normalize(words[chosen].float(), dim=-1)
                logits = self.sharpness * (unit @ vectors.T)
                losses = F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
                counted = weight * (target >= 0)
                total = total + (losses * counted).sum() / counted.sum().clamp(min=1)
        return total / 4


class PlaceReader(nn.Module):
    """Says where in its frame each token of a video lies.

    It is trained with the tower, as `WordReader` is, and thrown away: towers that were trained on
    much more keep a token's place in the token, and only what is in the token outlives that tokens
    are merged or left out.
    """

    def __init__(self, width: int, grid: int) -> None:
        """Take D, the width of a token, and the tokens on one side of a frame."""
        super().__init__()
        self.grid = grid
        self.row = nn.Linear(width, grid)
        self.column = nn.Linear(width, grid)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of reading rows and columns off tokens (B, T, grid * grid, D)."""
        unit = F.normalize(tokens.float(), dim=-1) * tokens.shape[-1] ** 0.5
        number = torch.arange(self.grid * self.grid, device=tokens.device)
        place = number.expand(tokens.shape[:3]).flatten()
        flat = unit.flatten(0, 2)
        row = F.cross_entropy(self.row(flat), place // self.grid)
        return (row + F.cross_entropy(self.column(flat), place % self.grid)) / 2


def length_penalty(tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return how unlike in length a video's tokens (N, D) and words (V, D) are: 0 if alike.

    Reading looks at directions alone. Left free, tokens grow tens of times as long as words, and
    then no layer of the language model can add much to them.
    """
    length = words.detach().float().norm(dim=-1).mean()
    return (tokens.float().norm(dim=-1).clamp(min=1e-6) / length).log().square().mean()
