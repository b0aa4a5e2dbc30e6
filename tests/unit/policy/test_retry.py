import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_server.domain.endpoint import RetryPolicy
from outrider_server.policy.retry import (
    next_attempt_at,
    next_delay_seconds,
    nominal_delay_seconds,
)

POLICIES = st.builds(
    RetryPolicy,
    base_seconds=st.floats(0.001, 3600),
    factor=st.floats(1, 100),
    maximum_seconds=st.floats(1, 1e6),
    jitter=st.floats(0, 1),
    attempts_max=st.integers(1, 5000),
    window_seconds=st.floats(0, 1e7),
)
RANDOM = st.floats(0, 1, exclude_max=True)


@given(POLICIES, st.integers(1, 6000), RANDOM)
def test_a_delay_lies_within_its_spread_and_its_maximum(
    policy: RetryPolicy, attempt: int, random: float
) -> None:
    delay = next_delay_seconds(policy, attempt, random)
    if attempt >= policy.attempts_max:
        assert delay is None
        return
    assert delay is not None
    assert math.isfinite(delay)
    nominal = nominal_delay_seconds(policy, attempt)
    slack = 1e-9 * nominal
    assert nominal * (1 - policy.jitter) - slack <= delay
    assert delay <= nominal * (1 + policy.jitter) + slack
    assert 0 <= delay <= policy.maximum_seconds * (1 + policy.jitter) + slack


@given(POLICIES, st.integers(1, 5000))
def test_delays_never_shrink(policy: RetryPolicy, attempt: int) -> None:
    assert nominal_delay_seconds(policy, attempt) <= nominal_delay_seconds(policy, attempt + 1)


@given(POLICIES, st.integers(1, 50), RANDOM, RANDOM)
def test_a_larger_random_number_never_gives_a_shorter_delay(
    policy: RetryPolicy, attempt: int, one: float, other: float
) -> None:
    first = next_delay_seconds(policy, attempt, min(one, other))
    second = next_delay_seconds(policy, attempt, max(one, other))
    assert (first is None) == (second is None)
    assert first is None or second is None or first <= second


def test_the_default_policy_grows_by_its_factor_up_to_its_maximum() -> None:
    policy = RetryPolicy()
    delays = [next_delay_seconds(policy, attempt, 0.5) for attempt in range(1, 20)]
    assert delays[:4] == [2.0, 6.0, 18.0, 54.0]
    assert delays[-1] == 36_000.0
    assert next_delay_seconds(policy, 20, 0.5) is None


@given(POLICIES, st.integers(1, 6000), RANDOM, st.floats(0, 1e7))
def test_no_attempt_is_due_outside_the_window(
    policy: RetryPolicy, attempt: int, random: float, age: float
) -> None:
    event_at = 1_764_000_000.0
    due = next_attempt_at(policy, attempt, random, event_at + age, event_at)
    if due is not None:
        assert event_at + age <= due <= event_at + policy.window_seconds


@pytest.mark.parametrize(("age", "due"), [(88.0, 90.0), (98.0, 100.0), (98.1, None)])
def test_the_window_includes_its_end(age: float, due: float | None) -> None:
    policy = RetryPolicy(base_seconds=2.0, jitter=0.0, window_seconds=100.0)
    assert next_attempt_at(policy, 1, 0.5, age, 0.0) == due
