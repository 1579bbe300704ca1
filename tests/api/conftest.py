"""A fake peer whose driver is the test's process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.fake_peer import FakePeer, driving


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[FakePeer]:
    with driving(tmp_path / "peer") as fake:
        yield fake
