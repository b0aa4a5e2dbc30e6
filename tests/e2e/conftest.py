from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.service import Template, template


@pytest.fixture(scope="session")
def fresh_state() -> Iterator[Template]:
    """A migrated state folder that each test copies."""
    with template() as made:
        yield made
