"""docs/python.md: its blocks run, and it names every setting there is; every operator's help names every argument."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import tpfuse.ops
from tpfuse.config import KERNEL_PREFERENCES, PASSES, Config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text()


@pytest.mark.timeout(240)
def test_blocks(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "page.py").write_text("\n".join(blocks))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPFUSE_")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    for _ in range(2):  # a reader's second run finds Inductor's caches full
        command = [sys.executable, tmp_path / "page.py"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)[: len(fields(Config))] == [f.name for f in fields(Config)]
    assert [name for name in (*PASSES, *KERNEL_PREFERENCES) if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize("name", dir(tpfuse.ops))
def test_help_names_every_argument(name):
    call = getattr(tpfuse.ops, name)
    *parameters, kernels = inspect.signature(call).parameters
    assert kernels == "kernels"
    own = [p for p in parameters if not p.startswith("w_")]  # a product's, told by its first
    assert [p for p in own if not re.search(rf"\b{p}\b", call.__doc__)] == []


def test_public_names():
    assert [name for name in tpfuse.__all__ if not inspect.getdoc(getattr(tpfuse, name))] == []
