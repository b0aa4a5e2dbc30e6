"""Room for one more."""

from __future__ import annotations

import pytest

from outrider_server.api.limits import require_room
from outrider_server.domain.errors import FailedPrecondition


def test_last_place_may_be_taken_and_no_further() -> None:
    require_room(9, 10, "things")
    with pytest.raises(FailedPrecondition, match="10 things") as caught:
        require_room(10, 10, "things")
    assert caught.value.reason == "LIMIT_REACHED"
