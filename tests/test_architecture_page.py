"""docs/architecture.md sends nobody to a file that there is not."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = sorted(set(re.findall(r"`([a-z_/]+(?:/|\.py))`", (ROOT / "docs/architecture.md").read_text())))


@pytest.mark.parametrize("name", NAMED)
def test_it_is_there(name: str) -> None:
    assert (ROOT / name).exists() or (ROOT / "src/tpfuse" / name).exists()
