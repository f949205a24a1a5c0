"""Asks a running server the questions, several at a time, with the ``openai`` client."""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.accuracy.questions import HarnessError, Question
from bench.accuracy.results import Answer, Results, Run
from bench.accuracy.scoring import is_correct
from scissor_vllm.retention import RETENTION_RATIO, num_retained_tokens

TEMPERATURE = 0
RETRY_SECONDS = 1.0
"""Seconds before the second try of a request."""
GIVE_UP_AFTER = 20
"""Number of consecutive failures after which a run ends."""
_MAX_REASON = 300


@dataclass(frozen=True)
class ChatSettings:
    """How questions are sent."""

    base_url: str
    """URL of the server, without ``/v1``."""
    model: str
    max_tokens: int = 16
    concurrency: int = 4
    local_media: bool = False
    """Send ``file://`` URLs, which the server must allow, instead of the files."""
    max_video_bytes: int = 100_000_000
    """Largest size of a file that is sent."""
    timeout_seconds: float = 600.0

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that affect answers, by their names in a result file."""
        return {"max_tokens": self.max_tokens, "temperature": TEMPERATURE}


def check_videos(questions: Iterable[Question], settings: ChatSettings) -> None:
    """Check that every video can be sent.

    Raises:
        HarnessError: a video is too large; the message names another way to send it.
    """
    if settings.local_media:
        return
    for video in dict.fromkeys(question.video for question in questions):
        if (size := video.stat().st_size) > settings.max_video_bytes:
            raise HarnessError(
                f"a video that is sent must have at most {settings.max_video_bytes / 1e6:g} MB, "
                f"{video} has {size / 1e6:.1f}: start the server with --allowed-local-media-path "
                "FOLDER and give --local-media, or raise --max-video-mb"
            )


def ask_missing(
    results: Results,
    run: Run,
    questions: Sequence[Question],
    ratios: Sequence[float],
    settings: ChatSettings,
) -> int:
    """Ask the questions without an answer, save the answers, and return how many are still missing.

    Raises:
        HarnessError: the server does not compress, keeps a number of tokens that does not fit the
            ratio, or stopped answering. Earlier answers are saved.
    """
    from tqdm import tqdm

    todo = run.missing(questions, ratios)
    total = len(questions) * len(ratios)
    try:
        with tqdm(total=total, initial=total - len(todo), desc=run.label, unit="answer") as bar:
            asyncio.run(_ask_all(results, run, todo, settings, bar))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        results.save()
    return len(run.missing(questions, ratios))


async def _ask_all(
    results: Results,
    run: Run,
    todo: Sequence[tuple[Question, float]],
    settings: ChatSettings,
    bar: Any,
) -> None:
    from openai import AsyncOpenAI

    waiting = iter(todo)
    failures: list[str] = []
    num_failed = 0

    async def work(client: AsyncOpenAI) -> None:
        nonlocal num_failed
        for question, ratio in waiting:
            answer = await _ask_twice(client, question, ratio, settings)
            results.add(run, answer)
            bar.update()
            if answer.error is None:
                failures.clear()
                continue
            num_failed += 1
            bar.set_postfix(failed=num_failed)
            failures.append(answer.error)
            if len(failures) >= GIVE_UP_AFTER:
                raise HarnessError(
                    f"{GIVE_UP_AFTER} requests in a row failed at {settings.base_url}, the last "
                    f"with: {failures[-1]}; see the server's log, then give the same command "
                    "again: it goes on where this one stopped"
                )

    key = os.environ.get("OPENAI_API_KEY", "unused")
    async with (
        AsyncOpenAI(
            base_url=f"{settings.base_url}/v1",
            api_key=key,
            max_retries=0,
            timeout=settings.timeout_seconds,
        ) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(settings.concurrency):
            group.create_task(work(client))


async def _ask_twice(
    client: Any, question: Question, ratio: float, settings: ChatSettings
) -> Answer:
    """Return the answer, with an error if the second try failed too."""
    from openai import OpenAIError

    for last in (False, True):
        begin = time.perf_counter()
        try:
            completion = await client.chat.completions.create(
                model=settings.model,
                messages=[{"role": "user", "content": _content(question, settings)}],
                max_completion_tokens=settings.max_tokens,
                temperature=TEMPERATURE,
                extra_body={RETENTION_RATIO: ratio},
            )
        except OpenAIError as error:
            if last:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_REASON]
                seconds = round(time.perf_counter() - begin, 3)
                return Answer(question.id, ratio, None, None, None, None, None, seconds, reason)
            await asyncio.sleep(RETRY_SECONDS)
            continue
        return _read(completion, question, ratio, round(time.perf_counter() - begin, 3))
    raise AssertionError("unreachable")


def _content(question: Question, settings: ChatSettings) -> list[dict[str, Any]]:
    url = question.video.resolve().as_uri() if settings.local_media else _data_url(question.video)
    return [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": question.text},
    ]


def _data_url(path: Path) -> str:
    media_type = mimetypes.guess_type(path.name)[0] or "video/mp4"
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _read(completion: Any, question: Question, ratio: float, seconds: float) -> Answer:
    compression = getattr(completion, "video_compression", None)
    if compression is None:
        raise HarnessError(
            "the server does not compress videos (its answer has no video_compression): start it "
            "with `scissor-vllm serve` and a supported model"
        )
    num_tokens = compression["num_video_tokens"]
    num_retained = compression["num_retained_video_tokens"]
    if num_retained != num_retained_tokens(num_tokens, ratio):
        raise HarnessError(
            f"the server must keep {num_retained_tokens(num_tokens, ratio)} of {num_tokens} video "
            f"tokens at ratio {ratio}, it reports {num_retained}: it is no server of this version"
        )
    text = completion.choices[0].message.content or ""
    return Answer(
        id=question.id,
        retention_ratio=ratio,
        text=text,
        correct=is_correct(text, question.answer, question.choices),
        num_video_tokens=num_tokens,
        num_retained_tokens=num_retained,
        prompt_tokens=completion.usage.prompt_tokens,
        seconds=seconds,
        error=None,
    )
