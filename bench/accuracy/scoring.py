"""Whether an answer is the expected one: short words, or a letter among choices.

No model judges answers, and nothing is guessed: an answer that cannot be parsed is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

_ARTICLES = {"a", "an", "the"}
_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_LEAD = (
    r"(?:(?:the\s+)?(?:best\s+|correct\s+|right\s+|final\s+)*(?:answer|option|choice)\b\s*"
    r"(?:is\b)?\s*[:\-]?\s*)*"
)
_SEVERAL = re.compile(r"^\W*[A-Z]\W*(?:,|/|&|\band\b|\bor\b)\W*[A-Z]\b(?!')")
_FIRST = re.compile(
    # A letter alone, in brackets, or before punctuation, but not the article of "A red ball".
    rf"^\W*{_LEAD}[\"'*\s]*(?:\((?P<bracketed>[A-Za-z])\)|(?P<marked>[A-Za-z])\s*(?:[.):,\n]|$))",
    re.IGNORECASE,
)


def is_correct(answer: str, expected: str, choices: Sequence[str] = ()) -> bool:
    """Return whether an answer is the expected one.

    Args:
        answer: the model's answer.
        expected: the expected words, or the letter of the expected choice.
        choices: the choices of the letters A, B, ...; empty for a free answer.
    """
    if choices:
        return choose(answer, choices) == expected
    return normalize(answer) == normalize(expected)


def normalize(text: str) -> str:
    """Return the words: lower case, no punctuation, no articles, numbers as digits."""
    words = re.findall(r"[^\W_]+", text.lower().replace("'", ""))
    # "a" is an article before another word; alone it may be the letter that was shown.
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in kept)


def choose(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer names, None if it names none or several.

    Accepted forms are "B", "(B)", "b.", "B. red", "Answer: B", "The answer is (B) red", and a
    choice's words if no other choice has them. If a sentence names several choices, the longest
    counts if it contains the others.
    """
    letters = ascii_uppercase[: len(choices)]
    words = normalize(answer)
    if named := _named(words, choices):
        return letters[named[0]] if len(named) == 1 else None
    if _SEVERAL.match(answer):
        return None
    if match := _FIRST.match(answer.strip()):
        letter = (match["bracketed"] or match["marked"]).upper()
        return letter if letter in letters else None
    if bracketed := set(re.findall(rf"\(([{letters}])\)", answer)):
        return bracketed.pop() if len(bracketed) == 1 else None
    if match := re.search(rf"\b(?:answer|option|choice)\s+(?:is\s+)?([{letters}])\b", answer):
        return match[1]
    within = [
        number
        for number, choice in enumerate(map(normalize, choices))
        if choice and f" {choice} " in f" {words} "
    ]
    longest = [
        number
        for number in within
        if all(normalize(choices[o]) in normalize(choices[number]) for o in within)
    ]
    if within:
        return letters[longest[0]] if len(longest) == 1 else None
    match = re.search(rf"\b([{letters}])\W*$", answer)
    return match[1] if match else None


def _named(words: str, choices: Sequence[str]) -> list[int]:
    """Return the choices whose words are all in the answer; a single letter is no word here."""
    if len(words) == 1 and words.isalpha():
        return []
    return [number for number, choice in enumerate(choices) if normalize(choice) == words]
