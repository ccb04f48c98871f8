"""The fixture that most tests of the service share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.live import Live, running


@pytest.fixture
def live() -> Iterator[Live]:
    """The app with default settings, running."""
    with running() as app:
        yield app
