"""num_retained_tokens: how many tokens a retention ratio keeps."""

import math
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scissor_vllm import num_retained_tokens
from scissor_vllm.retention import (
    BudgetTooSmallError,
    check_retention_ratio,
    count_retained,
    parse_retention_ratio,
    shared_out,
)
from scissor_vllm.settings import RetentionPolicy

ratios = st.floats(min_value=0, max_value=1, exclude_min=True)
sizes = st.integers(1, 10**7)
REFUSAL = (
    "^retention_ratio must be a number above 0 and at most 1, got .*: it is the fraction of video "
    "tokens to keep, 1.0 keeps all$"
)


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "kept"),
    [
        (6272, 0.1, 628),
        (6272, 0.05, 314),
        (6272, 0.35, 2196),
        (6272, 0.5, 3136),
        (6272, 1.0, 6272),
        (6272, 1, 6272),
        (1, 0.001, 1),
        (1, 1, 1),
        (10**6, 5e-324, 1),
        (2**60, 1.0, 2**60),
        (10**20, 0.1, 10**19),
    ],
)
def test_kept_is_the_ceiling_of_ratio_times_tokens(
    num_tokens: int, ratio: float, kept: int
) -> None:
    assert num_retained_tokens(num_tokens, ratio) == kept


# Binary puts each of these just above the whole number that the decimals give: the product of the
# floats, or (30) the exact product of the float's own binary value.
@pytest.mark.parametrize(
    ("num_tokens", "ratio", "kept"),
    [
        (30, 0.1, 3),
        (100, 0.07, 7),
        (100, 0.55, 55),
        (100, 0.14, 14),
        (50, 0.28, 14),
    ],
)
def test_ratio_counts_as_the_decimal_it_is_written_as(
    num_tokens: int, ratio: float, kept: int
) -> None:
    assert num_retained_tokens(num_tokens, ratio) == kept
    in_binary = {math.ceil(ratio * num_tokens), math.ceil(Fraction(ratio) * num_tokens)}
    assert kept + 1 in in_binary, "the case proves nothing"


@given(digits=st.integers(1, 6), data=st.data())
def test_decimal_ratios_are_exact(digits: int, data: st.DataObject) -> None:
    numerator = data.draw(st.integers(1, 10**digits))
    num_tokens = data.draw(sizes)
    kept = -(-numerator * num_tokens // 10**digits)
    written = f"{numerator / 10**digits:.{digits}f}"
    assert num_retained_tokens(num_tokens, float(written)) == kept
    assert num_retained_tokens(num_tokens, Decimal(written)) == kept
    assert num_retained_tokens(num_tokens, Fraction(numerator, 10**digits)) == kept


def test_fraction_is_taken_as_it_is() -> None:
    assert num_retained_tokens(9, Fraction(1, 3)) == 3
    assert num_retained_tokens(9, 1 / 3) == 3  # 0.333…3, a little less than a third
    assert num_retained_tokens(9 * 10**16, Fraction(1, 3)) == 3 * 10**16


def test_float_subclass_counts_like_the_float() -> None:
    assert num_retained_tokens(30, np.float64(0.1)) == 3


@given(num_tokens=sizes, ratio=ratios)
def test_at_least_one_and_at_most_all_are_kept(num_tokens: int, ratio: float) -> None:
    kept = num_retained_tokens(num_tokens, ratio)
    assert type(kept) is int
    assert 1 <= kept <= num_tokens


@given(num_tokens=sizes, pair=st.tuples(ratios, ratios))
def test_a_larger_ratio_never_keeps_less(num_tokens: int, pair: tuple[float, float]) -> None:
    low, high = sorted(pair)
    assert num_retained_tokens(num_tokens, low) <= num_retained_tokens(num_tokens, high)


@pytest.mark.parametrize(
    "ratio",
    [
        0, 0.0, -0.0, -0.1, -1, 2, 1.0000000000000002, 1.5,
        float("nan"), float("inf"), float("-inf"),
        Decimal(0), Decimal("-0.5"), Decimal("1.1"), Decimal("NaN"), Decimal("Infinity"),
        Fraction(0), Fraction(-1, 2), Fraction(3, 2),
    ],
)  # fmt: skip
def test_ratio_outside_zero_to_one_is_a_value_error(ratio: float) -> None:
    with pytest.raises(ValueError, match=REFUSAL):
        num_retained_tokens(100, ratio)


@pytest.mark.parametrize("ratio", [True, False, "0.1", None, [0.1]])
def test_ratio_that_is_no_number_is_a_type_error(ratio: float) -> None:
    with pytest.raises(TypeError, match=REFUSAL):
        num_retained_tokens(100, ratio)


@pytest.mark.parametrize("text", ["0", "1.5", "nan", "half", "", "10%"])
def test_a_command_line_refuses_what_is_no_ratio_by_the_same_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=REFUSAL):
        parse_retention_ratio(text)
    assert parse_retention_ratio("0.25") == 0.25


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2, "2"), (1.5, "1.5"), (float("nan"), "NaN"), ("0.5", '"0.5"'), (True, "true"),
        (None, "null"), ([0.5] * 9999, "an array"), ({"a": 1}, "an object"),
        pytest.param(10**9999, "a very large integer", id="large"),
        ("x" * 9999, '"' + "x" * 40 + '..."'),
        (Decimal("1.1"), "1.1"), (Fraction(3, 2), "3/2"),
    ],
)  # fmt: skip
def test_a_refusal_shows_the_value_as_json_has_it(value: object, shown: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        check_retention_ratio(value)
    assert f"got {shown}: " in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("num_tokens", [0, -1, -100])
def test_fewer_than_one_token_is_a_value_error(num_tokens: int) -> None:
    with pytest.raises(ValueError, match="num_tokens"):
        num_retained_tokens(num_tokens, 0.5)


@pytest.mark.parametrize("num_tokens", [10.0, 10.5, "10", None, Fraction(10)])
def test_number_of_tokens_that_is_no_int_is_a_type_error(num_tokens: int) -> None:
    with pytest.raises(TypeError):
        num_retained_tokens(num_tokens, 0.5)


def test_errors_name_the_value_received() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        num_retained_tokens(100, 1.5)
    with pytest.raises(ValueError, match="-7"):
        num_retained_tokens(-7, 0.5)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_video_tokens_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_video_tokens must be at least 1, got {limit}"):
        RetentionPolicy.from_mm_processor_kwargs({"max_video_tokens": limit})


@pytest.mark.parametrize("limit", [1.5, "8", True, None])
def test_a_limit_of_video_tokens_that_is_no_integer_is_refused(limit: object) -> None:
    with pytest.raises(TypeError, match="max_video_tokens must be an int"):
        RetentionPolicy.from_mm_processor_kwargs({"max_video_tokens": limit})


def test_the_limit_of_video_tokens_is_of_what_is_compressed() -> None:
    policy = RetentionPolicy.from_mm_processor_kwargs({"max_video_tokens": 100})
    policy.check_num_tokens(100, 0.1)
    policy.check_num_tokens(101, 1.0)
    with pytest.raises(ValueError, match=r"100 tokens before compression.*got 101"):
        policy.check_num_tokens(101, 0.99)


# The budget.


@st.composite
def shared(draw: st.DrawFn) -> tuple[int, list[int], list[int], list[int]]:
    """Total, weights and bounds."""
    bounds = st.lists(st.integers(1, 60), min_size=3, max_size=3)
    rows = draw(st.lists(bounds, min_size=1, max_size=7))
    weights = [row[0] for row in rows]
    least, most = [min(row[1:]) for row in rows], [max(row[1:]) for row in rows]
    return draw(st.integers(sum(least), sum(most))), weights, least, most


def exact_shares(
    total: int, weights: list[int], least: list[int], most: list[int]
) -> list[Fraction]:
    """Return clamp(factor * weight) for the factor that gives the total, by trying every piece."""

    def at(factor: Fraction) -> list[Fraction]:
        rows = zip(weights, least, most, strict=True)
        return [min(max(factor * w, Fraction(low)), Fraction(high)) for w, low, high in rows]

    rows = list(zip(weights, least, most, strict=True))
    corners = sorted({Fraction(bound, w) for w, *bounds in rows for bound in bounds})
    for left, right in zip([Fraction(0), *corners], [*corners, corners[-1]], strict=True):
        low, high = sum(at(left), Fraction(0)), sum(at(right), Fraction(0))
        if low <= total <= high:
            share = Fraction(0) if high == low else (total - low) / (high - low)
            return at(left + (right - left) * share)
    raise AssertionError("the total is outside of the bounds")


@given(shared())
def test_shares_are_the_exact_ones_rounded_by_largest_remainders(
    case: tuple[int, list[int], list[int], list[int]],
) -> None:
    total, weights, least, most = case
    exact = exact_shares(*case)
    expected = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: -(exact[i] - expected[i]))
    for index in order[: total - sum(expected)]:
        expected[index] += 1
    shares = shared_out(total, weights, least, most)
    assert shares == expected
    assert sum(shares) == total
    assert all(low <= k <= high for low, k, high in zip(least, shares, most, strict=True))


def test_a_thousand_videos_are_shared_out_at_once() -> None:
    weights = [1 + 37 * i % 4096 for i in range(1000)]
    most = [num_retained_tokens(weight, 0.9) for weight in weights]
    begin = time.perf_counter()
    for total in (1000, 1001, sum(most) // 3, sum(most) - 1):
        assert sum(shared_out(total, weights, [1] * 1000, most)) == total
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "budget", "expected"),
    [
        ([100], 1.0, 30, [30]),
        ([100, 50], 1.0, 30, [20, 10]),
        ([100, 100, 100], 1.0, 10, [4, 3, 3]),
        ([1000, 1, 1], 1.0, 12, [10, 1, 1]),
        ([100, 1, 1], 0.1, 11, [9, 1, 1]),
        ([100, 50], 0.1, 15, [10, 5]),
        ([100, 50], 0.1, 14, [9, 5]),
        ([100, 50], 0.1, 10**40, [10, 5]),
    ],
)
def test_a_budget_is_shared_out_by_lengths(
    num_tokens: list[int], ratio: float, budget: int, expected: list[int]
) -> None:
    counts = count_retained(num_tokens, ratio, budget, min_ratio=0.01)
    assert list(counts.num_retained) == expected
    by_ratio = [num_retained_tokens(count, ratio) for count in num_tokens]
    assert counts.is_budgeted == (sum(by_ratio) > budget)
    assert counts.ratio == (budget / sum(num_tokens) if counts.is_budgeted else ratio)


@given(
    num_tokens=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    budget=st.integers(1, 20000),
    ratio=st.floats(0.05, 1),
)
def test_no_video_keeps_more_than_the_ratio_or_less_than_the_minimum(
    num_tokens: list[int], budget: int, ratio: float
) -> None:
    least = [num_retained_tokens(count, 0.05) for count in num_tokens]
    most = [num_retained_tokens(count, ratio) for count in num_tokens]
    if budget < min(sum(least), sum(most)):
        with pytest.raises(BudgetTooSmallError, match=f"at least {sum(least)} .* got {budget}:"):
            count_retained(num_tokens, ratio, budget, min_ratio=0.05)
        return
    counts = count_retained(num_tokens, ratio, budget, min_ratio=0.05)
    kept = [k for k in counts.num_retained if k is not None]
    assert sum(kept) == min(budget, sum(most))
    assert all(low <= k <= high for low, k, high in zip(least, kept, most, strict=True))


def test_a_video_of_unknown_length_has_no_share() -> None:
    assert count_retained([None, 30], 0.1).num_retained == (None, 3)
    with pytest.raises(BudgetTooSmallError, match="video 1 is named by its uuid alone"):
        count_retained([30, None], 0.1, 9)
