"""What a response's status means for the deliveries it answers: the one table.

Rule: only 2xx is success. Everything else, redirects and 4xx included, is tried again until the retry policy ends:
a receiver that is misconfigured for an hour answers 401, 404 or 410 too, and a delivery given up early cannot be
called back, while one tried too often costs a request. Interim (1xx) responses never get here.
"""

from __future__ import annotations

from outrider_server.domain.outcome import Verdict


def verdict_of(status: int) -> Verdict:
    """The verdict on an attempt that was answered with `status`."""
    return Verdict.DELIVERED if 200 <= status <= 299 else Verdict.RETRY
