"""Many questions about one clip in one sequence: the clip's tokens once, the questions behind them.

A sequence is ``prefix, video, question, question, ...``. Each question sees the prefix, the video
and itself, and its positions begin right after the video: its logits are those of a conversation
that holds this question alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PREFIX = "<|im_start|>user\n"
_BETWEEN = "<|im_end|>\n<|im_start|>assistant\n"
_END = "<|im_end|>"
IGNORED = -100
"""Label of a token that is not to be predicted."""
NO_QUESTION = -1


@dataclass(frozen=True)
class PackedQuestions:
    """Questions about each of B clips, L tokens a clip, int64 on one device."""

    tokens: torch.Tensor
    """(B, L)"""
    offsets: torch.Tensor
    """(B, L): position of a token within its question."""
    questions: torch.Tensor
    """(B, L): which of its clip's questions a token belongs to, NO_QUESTION for padding."""
    labels: torch.Tensor
    """(B, L): the token that follows, where it belongs to an answer; else IGNORED."""
    skills: torch.Tensor
    """(B, L): index of the question's skill."""

    def to(self, device: torch.device) -> PackedQuestions:
        """Return them on a device."""
        return PackedQuestions(
            *(field.to(device, non_blocking=True) for field in vars(self).values())
        )

    def pin_memory(self) -> PackedQuestions:
        """Return them in page-locked memory; a data loader calls this."""
        return PackedQuestions(*(field.pin_memory() for field in vars(self).values()))


@dataclass(frozen=True)
class EncodedQuestion:
    """A question and its answer in tokens."""

    tokens: tuple[int, ...]
    num_answer_tokens: int
    """At the end, the token that ends an answer included."""
    skill: int


class Encoder:
    """Puts questions into tokens as the chat template does."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a `tokenizers.Tokenizer`."""
        self._tokenizer = tokenizer
        self.prefix: tuple[int, ...] = self._encode(PREFIX)
        self._between = self._encode(_BETWEEN)
        self._end = self._encode(_END)
        (self.padding,) = self._encode("<|endoftext|>")
        (self.video,) = self._encode("<video>")

    def __call__(self, text: str, answer: str, skill: int) -> EncodedQuestion:
        """Return a question and its answer; their tokens are those of the whole conversation.

        The special tokens around them keep a tokenizer from joining pieces across.
        """
        encoded_answer = (*self._encode(answer), *self._end)
        tokens = (*self._encode(text), *self._between, *encoded_answer)
        return EncodedQuestion(tokens, len(encoded_answer), skill)

    def continued(self, text: str, answer: str, skill: int) -> EncodedQuestion:
        """Return a text and what follows it, as they are: no template, no end."""
        encoded_answer = self._encode(answer)
        return EncodedQuestion((*self._encode(text), *encoded_answer), len(encoded_answer), skill)

    def token(self, word: str) -> int:
        """Return the one token of a word. ValueError if it has several."""
        tokens = self._encode(word)
        if len(tokens) != 1:
            raise ValueError(f"{word!r} must be one token, got {len(tokens)}: add it to the words")
        return tokens[0]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


def pack(
    clips: Sequence[Sequence[EncodedQuestion]], length: int, padding: int
) -> tuple[PackedQuestions, int]:
    """Return the questions of each clip in rows of `length` tokens, and how many did not fit.

    Questions of a clip are taken in order; one that finds no room is left out.
    """
    shape = (len(clips), length)
    tokens = np.full(shape, padding, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    offsets, skills = np.zeros((2, *shape), dtype=np.int64)
    questions = np.full(shape, NO_QUESTION, dtype=np.int64)
    num_left_out = 0
    for row, clip in enumerate(clips):
        begin = 0
        for index, question in enumerate(clip):
            # The last token ends the answer: it is predicted and predicts nothing.
            size = len(question.tokens) - 1
            if begin + size > length:
                num_left_out += 1
                continue
            place = slice(begin, begin + size)
            tokens[row, place] = question.tokens[:-1]
            offsets[row, place] = np.arange(size)
            questions[row, place] = index
            skills[row, place] = question.skill
            answer = question.num_answer_tokens
            labels[row, begin + size - answer : begin + size] = question.tokens[-answer:]
            begin += size
    fields = (torch.from_numpy(field) for field in (tokens, offsets, questions, labels, skills))
    return PackedQuestions(*fields), num_left_out


def question_mask(questions: torch.Tensor, num_shared: int) -> torch.Tensor:
    """Return which keys each question token sees, bool (B, 1, L, num_shared + L).

    Args:
        questions: (B, L), as in PackedQuestions.
        num_shared: tokens of prefix and video, which all see.
    """
    length = questions.shape[1]
    is_same_question = questions[:, :, None] == questions[:, None, :]
    is_visible = (
        is_same_question
        & torch.ones(length, length, dtype=torch.bool, device=questions.device).tril()
    )
    return torch.nn.functional.pad(is_visible, (num_shared, 0), value=True)[:, None]
