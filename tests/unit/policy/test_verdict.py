import pytest

from outrider_server.domain.outcome import Verdict
from outrider_server.policy.verdict import verdict_of


@pytest.mark.parametrize("status", range(200, 300))
def test_every_2xx_is_delivered(status: int) -> None:
    assert verdict_of(status) is Verdict.DELIVERED


@pytest.mark.parametrize("status", [0, 101, 199, 300, 301, 308, 400, 404, 410, 429, 500, 599, 999])
def test_nothing_else_is_success_and_nothing_is_given_up(status: int) -> None:
    assert verdict_of(status) is Verdict.RETRY
