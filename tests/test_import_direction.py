"""The import-direction check passes on the sources and catches planted violations."""

from pathlib import Path

import pytest

from tools.import_direction import check_tree

SOURCES = Path(__file__).parent.parent / "src" / "tpfuse"


def test_sources_point_one_way():
    assert check_tree(SOURCES) == []


def plant(tmp_path: Path, file: str, code: str) -> list[str]:
    path = tmp_path / "tpfuse" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return check_tree(tmp_path / "tpfuse")


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("target.py", "import tpfuse.ir.op", "target must not import ir"),
        ("ir/op.py", "from tpfuse.rewrite import match", "ir must not import rewrite"),
        ("ir/op.py", "from tpfuse import compiler", "ir must not import compiler"),
        ("ir/deep/er.py", "from ...rewrite import match", "ir must not import rewrite"),
        ("fusion/composites.py", "from ..raising.norms import raise_norm", "fusion must not import raising"),
        ("lowering/select.py", "def f():\n    from tpfuse.kernels import signal", "lowering must not import kernels"),
        ("compiler.py", "from tpfuse.kernels import signal", "compiler must not import kernels"),
        ("kernels/signal.py", "import tpfuse.lowering.table", "kernels must not import lowering"),
        ("runtime/agreement.py", "import tpfuse.compiler", "runtime must not import compiler"),
        ("ir/fused.py", "import tpfuse.gadgets", "gadgets has no layer"),
        ("raising/norms.py", "import torch\nx = torch.cuda.is_available()", "asks for a device: torch.cuda"),
        ("fusion/composites.py", "from torch import cuda", "asks for a device: import of torch.cuda"),
        ("ir/op.py", "import torch\nx = torch._ops.OpOverload", "torch._ops is private to torch"),
        ("ir/op.py", "from torch._guards import detect_fake_mode", "torch._guards.detect_fake_mode is private"),
        ("ir/op.py", "def f():\n    import torch._inductor.config", "torch._inductor.config is private"),
        ("fusion/composites.py", "from tpfuse.target import Target", "a device: import of tpfuse.target.Target"),
    ],
)
def test_catches(tmp_path, file, code, complaint):
    (found,) = plant(tmp_path, file, code)
    assert complaint in found
    assert found.startswith(f"{tmp_path / 'tpfuse' / file}:{len(code.splitlines())}: ")


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("ir/op.py", "import tpfuse.target, torch\nfrom tpfuse.ir import fused\nfrom .norm import rms_norm"),
        ("fusion/composites.py", "from tpfuse.target import Range\nfrom ..rewrite.rule import Rule"),
        ("compiler.py", "def f():\n    from tpfuse.kernels import workspace"),
        ("kernels/signal.py", "import torch\nfrom tpfuse.ir.op import op\nx = torch.cuda.current_device()"),
        ("ir/matmul.py", "import torch\nx = torch.ops.aten._scaled_mm, torch.__version__"),
        ("shim.py", "from torch._guards import detect_fake_mode"),
        ("report.py", "from tpfuse.target import Range"),
        ("cli/run.py", "import tpfuse.compiler\nfrom tpfuse.runtime import agreement"),
        ("__init__.py", "from tpfuse.compiler import backend"),
    ],
)
def test_allows(tmp_path, file, code):
    assert plant(tmp_path, file, code) == []
