"""``"retention_ratio": "auto"``: the highest ratio at which a request's first token comes in time.

Each API server chooses by itself and waits for nothing. It knows the prompts of all that the engine
has not answered yet, and measures what the engine takes for a prompt and for a token of it.

Two rules, one slow and one fast. The level is the highest ratio at which the requests of the last
seconds take less than a share of the engine's time; it has a band in which it stays. A request gets
less than the level while the backlog before it would make its first token late.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scissor_vllm.frontend.shared_load import Load, SharedLoad
from scissor_vllm.metrics import (
    DIRECTORY_VARIABLE,
    begin_auto_choices_at_zero,
    count_auto_choice,
)
from scissor_vllm.retention import AUTO_STEPS, Chooser, num_retained_tokens

if TYPE_CHECKING:
    from starlette.datastructures import State

MAX_LOADS = (0.75, 0.9)
"""Shares of the engine's time: below the first the ratio rises to a step, beyond the second it
falls from it."""
WAIT_SHARES = (0.58, 0.8)
"""Of the time that a goal leaves for waiting: with a longer backlog than the first a request gets
less than the highest ratio, beyond the second the lowest."""
AIM = 0.9
"""Share of the goal that is planned with. First tokens come later than planned: on an H200, for a
goal of 1.5 s at 8 requests/s, an aim of 1 had a p95 of 1.60 s, and 0.9 had 1.42, 1.50 and 1.55."""
RATE_SECONDS = 20.0
"""Over which the rate of requests is averaged."""
PREPARE_SECONDS = 5.0
"""Longest time from the choice of a request's ratio to the engine: one that fails on this way is
counted so long."""
PAUSE_SECONDS = 5.0
"""Before a ratio rises after its last move."""
_FORGET = 0.99
"""Weight of what was measured before, at each measurement."""
_RIDGE = 0.02
_SMOOTHING = 0.1


class CostModel:
    """Seconds that the engine takes for prompts: so many for each, so many for each token.

    Least squares over intervals between first tokens, old ones forgotten. Where all prompts have
    one length, half of the cost is each's.
    """

    def __init__(self) -> None:
        self._length = 0.0
        self._moments = [0.0] * 5
        self._solution: tuple[float, float] = (0.0, 0.0)

    @property
    def per_prompt(self) -> float:
        """Seconds for a prompt, however long."""
        return self._solution[0]

    @property
    def per_token(self) -> float:
        """Seconds for a token of a prompt."""
        return self._solution[1]

    def seconds(self, num_prompts: float, num_tokens: float) -> float:
        """Return what prompts with so many tokens together take; 0 before any was measured."""
        return self.per_prompt * num_prompts + self.per_token * num_tokens

    def observe(self, seconds: float, num_prompts: float, num_tokens: float) -> None:
        """Learn from an interval in which the engine was never idle.

        Args:
            seconds: its length.
            num_prompts: first tokens in it, at least 1.
            num_tokens: of these prompts.
        """
        if self._length == 0:
            self._length = max(1.0, num_tokens / num_prompts)
        tokens = num_tokens / self._length
        added = (
            num_prompts * num_prompts,
            num_prompts * tokens,
            tokens * tokens,
            num_prompts * seconds,
            tokens * seconds,
        )
        self._moments = [_FORGET * old + new for old, new in zip(self._moments, added, strict=True)]
        nn, nt, tt, ns, ts = self._moments
        ridge = _RIDGE * (nn + tt)
        nn, tt = nn + ridge, tt + ridge
        determinant = nn * tt - nt * nt
        prompt, token = (ns * tt - ts * nt) / determinant, (ts * nn - ns * nt) / determinant
        if prompt < 0:
            prompt, token = 0.0, ts / tt
        elif token < 0:
            prompt, token = ns / nn, 0.0
        self._solution = (prompt, token / self._length)


@dataclass
class _Typical:
    """Moving averages of requests."""

    before: float = 0.0
    """Seconds from a request's arrival to the choice of its ratio, and from there to the engine."""
    num_tokens: float = 0.0
    """Video tokens before compression."""

    def observe(self, before: float, num_tokens: float) -> None:
        if self.num_tokens == 0:
            self.before, self.num_tokens = before, num_tokens
        self.before += _SMOOTHING * (before - self.before)
        self.num_tokens += _SMOOTHING * (num_tokens - self.num_tokens)


class _Rate:
    """Moving average of how many requests come in a second."""

    def __init__(self, now: float) -> None:
        self._begin = self._last = now
        self._num_seen = self._count = 0.0
        self.per_second = 0.0

    def observe(self, now: float, num_arrived: float) -> None:
        """Look at how many have come so far."""
        elapsed = now - self._last
        arrived = max(0.0, num_arrived - self._num_seen)
        # They came one by one since the last look, and fade like those before.
        weight = 1.0
        if elapsed > 0:
            weight = -math.expm1(-elapsed / RATE_SECONDS) * RATE_SECONDS / elapsed
        self._count = self._count * math.exp(-elapsed / RATE_SECONDS) + arrived * weight
        self._last, self._num_seen = now, num_arrived
        # The first requests of a server are no rate yet.
        known = 1 - math.exp((self._begin - now) / RATE_SECONDS)
        self.per_second = self._count / (RATE_SECONDS * max(known, 0.1))


def auto_steps(lowest: float, highest: float) -> list[float]:
    """Return the ratios that are chosen from, the highest first: few, so that caches find them."""
    between = [step for step in AUTO_STEPS if lowest < step < highest]
    return sorted({lowest, *between, highest}, reverse=True)


class AutoRatio:
    """Chooses ratios, in one API server. Safe to call from several threads."""

    def __init__(
        self,
        bounds: tuple[float, float],
        target_seconds: float,
        pending: Callable[[], tuple[int, int]],
        shared: SharedLoad | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it for an operator's goal.

        Args:
            bounds: lowest and highest ratio.
            target_seconds: from a request's arrival to its first token.
            pending: returns how many of this server's prompts wait for their first token, and how
                many tokens they have together.
            shared: the load of all API servers; None for one server.
            clock: in seconds.
        """
        self.steps = auto_steps(*bounds)
        self._target = AIM * target_seconds
        self._pending = pending
        self._shared = shared or SharedLoad(None)
        self._clock = clock
        self._lock = threading.Lock()
        self._costs = CostModel()
        self._typical = _Typical()
        self._level = 0
        self._prepared: deque[tuple[float, float]] = deque()
        """When each ratio was chosen, and its tokens; until as many first tokens came."""
        self._own = Load(busy_since=clock())
        self._last_move = clock()
        self._rate = _Rate(clock())
        low, high = WAIT_SHARES
        between = max(1, len(self.steps) - 2)
        self._shares = [low + (high - low) * i / between for i in range(len(self.steps) - 1)]

    def choose(
        self,
        num_tokens: Sequence[int | None],
        elapsed: float,
        least: float = 0.0,
        most: float = 1.0,
    ) -> float:
        """Return the ratio of a request, which goes to the engine next.

        Args:
            num_tokens: N of its videos, None where that is not known.
            elapsed: seconds since it arrived.
            least: that its videos allow. Where no ratio to choose from is enough, the highest is
                returned.
            most: that its videos allow, unless ``least`` is more. Where all ratios to choose from
                are higher, the lowest is returned.
        """
        with self._lock:
            now = self._clock()
            load = self._load_of_all(num_arrived=self._own.num_arrived + 1)
            # To the others the engine is busy from now on.
            added = {"num_pending": self._own.num_pending + 1}
            if load.num_pending == 0:
                added["busy_since"] = now
            self._own = self._own._replace(**added)
            self._shared.publish(self._own)
            known = [tokens for tokens in num_tokens if tokens is not None]
            if elapsed < self._target:
                self._typical.observe(elapsed, sum(known) or self._typical.num_tokens)
            self._rate.observe(now, load.num_arrived)
            self._move(now)
            ratio = self._highest_in_time(known, elapsed, load, least, most)
            self._prepared.append((now, ratio * sum(known)))
            return ratio

    def preview(
        self,
        num_tokens: Sequence[int | None],
        elapsed: float,
        least: float = 0.0,
        most: float = 1.0,
    ) -> float:
        """Return what a request would get now that does not go to the engine."""
        with self._lock:
            known = [tokens for tokens in num_tokens if tokens is not None]
            return self._highest_in_time(known, elapsed, self._load_of_all(), least, most)

    def record_first_tokens(
        self, num_prompts: int, num_tokens: int, longest: float = math.inf
    ) -> None:
        """Learn that prompts with so many tokens together got their first tokens, just now.

        Args:
            num_prompts: in this step of the engine.
            num_tokens: of these prompts.
            longest: seconds since the first of them arrived. The engine may have been idle before.
        """
        if not num_prompts:
            return
        with self._lock:
            now = self._clock()
            for _ in range(min(num_prompts, len(self._prepared))):
                self._prepared.popleft()
            busy_since = max(self._shared.publish(self._own).busy_since, now - longest)
            self._load_of_all(busy_since=now)
            if now > busy_since:
                self._costs.observe(now - busy_since, num_prompts, num_tokens)

    def _load_of_all(self, **changed: float) -> Load:
        """Return the load of all API servers, with this one's prompts as they are now."""
        count, tokens = self._pending()
        while self._prepared and self._clock() - self._prepared[0][0] > PREPARE_SECONDS:
            self._prepared.popleft()
        prepared = sum(tokens for _, tokens in self._prepared)
        self._own = self._own._replace(
            num_pending=count,
            num_pending_tokens=tokens,
            num_prepared=max(0, len(self._prepared) - count),
            num_prepared_tokens=max(0, prepared - tokens),
            **changed,
        )
        return self._shared.publish(self._own)

    def _move(self, now: float) -> None:
        """Move the level of all requests by the load that they would be at each step."""
        while self._level < len(self._shares) and self._load(self._level) > MAX_LOADS[1]:
            self._level += 1
            self._last_move = now
        while self._level > 0 and now - self._last_move >= PAUSE_SECONDS:
            if self._load(self._level - 1) > MAX_LOADS[0]:
                break
            self._level -= 1
            self._last_move += PAUSE_SECONDS

    def _load(self, level: int) -> float:
        """Return the share of the engine's time that requests would take at a step."""
        num_tokens = self.steps[level] * self._typical.num_tokens
        return self._rate.per_second * self._costs.seconds(1, num_tokens)

    def _most_wait(self, level: int) -> float:
        """Return the longest backlog, in seconds, with which a level is kept."""
        num_tokens = self.steps[level] * self._typical.num_tokens
        left = self._target - self._typical.before - self._costs.seconds(1, num_tokens)
        return max(0.0, self._shares[level] * left)

    def _highest_in_time(
        self, num_tokens: Sequence[int], elapsed: float, load: Load, least: float, most: float
    ) -> float:
        """Return the highest ratio from the level on that the backlog leaves to a request.

        Where its first token is in time at none, compression is no remedy: the level's.
        """
        wait = self._costs.seconds(
            load.num_pending + load.num_prepared,
            load.num_pending_tokens + load.num_prepared_tokens,
        )
        lowest = max(0, sum(step >= least for step in self.steps) - 1)
        index = min(max(self._level, sum(step > most for step in self.steps)), lowest)
        while index < lowest and wait > self._most_wait(index):
            index += 1
        for ratio in self.steps[index : lowest + 1]:
            kept = sum(num_retained_tokens(count, ratio) for count in num_tokens)
            if elapsed + wait + self._costs.seconds(1, kept) <= self._target:
                return ratio
        return self.steps[index]


def begin_auto(engine_client: Any, state: State) -> AutoRatio | None:
    """Return what chooses ratios in an API server, None where the operator wants none chosen.

    Raises:
        ValueError: the engine gives no statistics.
    """
    from scissor_vllm.vllm_compat import pending_prompts, watch_first_tokens

    policy = state.retention_policy
    if engine_client is None or not state.compresses_video or policy.auto_bounds is None:
        return None
    folder = os.environ.get(DIRECTORY_VARIABLE)
    auto = AutoRatio(
        policy.auto_bounds,
        policy.target_ttft_ms / 1000,
        partial(pending_prompts, engine_client),
        SharedLoad(Path(folder) if folder else None),
    )
    watch_first_tokens(engine_client, auto.record_first_tokens)
    begin_auto_choices_at_zero(auto.steps)
    return auto


def chooser(state: State, *, is_counted: bool) -> Chooser | None:
    """Return what chooses the ratio of a request that has just arrived, None for nothing.

    Args:
        state: of the app.
        is_counted: whether the request goes to the engine.
    """
    auto: AutoRatio | None = state.auto_ratio
    if auto is None:
        return None
    arrival = time.monotonic()

    def choose(num_tokens: Sequence[int | None], least: float, most: float) -> float:
        elapsed = time.monotonic() - arrival
        if not is_counted:
            return auto.preview(num_tokens, elapsed, least, most)
        ratio = auto.choose(num_tokens, elapsed, least, most)
        count_auto_choice(ratio)
        return ratio

    return choose
