"""docs/fusions.md: written from the rules as they are, and every test that it names exists."""

import subprocess
import sys

from tools import fusions_page


def test_up_to_date() -> None:
    assert fusions_page.PAGE.read_text() == fusions_page.page()[0], "run `python tools/fusions_page.py`"


def test_every_test_that_it_names_exists() -> None:
    tests = fusions_page.page()[1]
    files = sorted({test.partition("::")[0] for test in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    listed = subprocess.run(command, cwd=fusions_page.PAGE.parent.parent, capture_output=True, text=True, check=True).stdout
    assert not set(tests) - set(listed.splitlines())
