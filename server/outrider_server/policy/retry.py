"""When a failed delivery is tried again, and when its policy ends.

Exponential back-off with jitter, bounded three ways: by the largest delay, by the number of attempts and by a window
that begins with the event. Rule: what is random comes in as an argument, a number in [0, 1).
"""

from __future__ import annotations

import math

from outrider_server.domain.endpoint import RetryPolicy


def next_delay_seconds(policy: RetryPolicy, attempt: int, random: float) -> float | None:
    """Seconds to wait after attempt number `attempt` (the first is 1) failed; None when it was the last.

    `random` spreads the delay over `1 +- jitter` of its nominal value, so that what failed together does not come
    back together.
    """
    if attempt >= policy.attempts_max:
        return None
    return nominal_delay_seconds(policy, attempt) * (1.0 + policy.jitter * (2.0 * random - 1.0))


def next_attempt_at(
    policy: RetryPolicy, attempt: int, random: float, now: float, event_at: float
) -> float | None:
    """When the next attempt is due, in the unit and epoch of `now` (seconds); None when the policy ends.

    It also ends where the next attempt would fall later than the policy's window after the event: waiting for an
    attempt that will never be made only hides that the delivery is dead.
    """
    delay = next_delay_seconds(policy, attempt, random)
    if delay is None:
        return None
    due = now + delay
    return None if due > event_at + policy.window_seconds else due


def nominal_delay_seconds(policy: RetryPolicy, attempt: int) -> float:
    """The delay after attempt number `attempt` before its spread: never falls while the factor is 1 or more."""
    try:
        delay = policy.base_seconds * policy.factor ** (max(attempt, 1) - 1)
    except OverflowError:
        delay = math.inf
    return min(delay, policy.maximum_seconds)
