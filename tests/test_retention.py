"""num_retained_tokens: how many tokens a retention ratio keeps."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scissor_vllm import num_retained_tokens
from scissor_vllm.retention import check_retention_ratio, parse_retention_ratio
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
