"""The worked examples of CONTRIBUTING.md run, in order, and print what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.timeout(240)
def test_examples(tmp_path):
    blocks = FENCE.findall((ROOT / "CONTRIBUTING.md").read_text())
    code = [text for kind, text in blocks if kind == "python"]
    (printed,) = [text for kind, text in blocks if kind == "text"]
    kernel = next(text for text in code if text.startswith("# relu_squared_kernel.py"))
    (tmp_path / "relu_squared_kernel.py").write_text("import torch\n" + kernel)
    check = (
        "launched = relu_squared_quantize.launcher('triton')(x, scale, 'fp8_tensor', 'row', alive=(True, False, True))\n"
        "body = relu_squared_quantize.reference(x, scale, 'fp8_tensor', 'row')\n"
        "assert torch.equal(launched[0].float(), body[0].float()) and torch.equal(launched[2], body[2])\n"
    )
    (tmp_path / "examples.py").write_text("\n".join([text for text in code if text is not kernel] + [check]))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    done = subprocess.run(
        [sys.executable, tmp_path / "examples.py"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed.strip() in done.stdout
    assert "relu_squared_quantize" in done.stdout.split(printed.strip())[1]  # the report
