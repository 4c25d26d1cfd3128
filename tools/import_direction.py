"""Check that tpfuse's imports point one way and that private names of torch stand in the shim.

Usage: python tools/import_direction.py src

Lower layers never import higher ones, stages of the pipeline never import each other, and kernels are named by string:
only the layers that run a graph may import one, and only inside a function, so that `explain` works without a GPU.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# Lowest first.  A module imports from rows above its own in this list; inside BASE also from its neighbours.
BASE = ("target", "report", "config", "files", "formats", "shim")
LAYERS: tuple[tuple[str, ...], ...] = (
    BASE,
    ("ir",),
    ("rewrite",),
    ("raising", "fusion", "lowering"),
    ("runtime",),
    ("compiler",),
    ("ops",),
    ("testing", "measure"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
KERNELS_MAY_IMPORT = frozenset({*BASE, "ir", "kernels"})
MAY_LOAD_KERNELS = frozenset({"runtime", "compiler", "ops", "testing", "measure", "cli"})  # inside functions only
DEVICE_FREE = frozenset({"rewrite", "raising", "fusion"})
DEVICE_MODULES = frozenset({"torch.cuda", "torch.accelerator", "torch.xpu"})


def check_tree(package: Path) -> list[str]:
    """Every violation under the folder `package` (the one named tpfuse), as `path:line: what`."""
    return [found for path in sorted(package.rglob("*.py")) for found in _check_file(path, package)]


def _check_file(path: Path, package: Path) -> Iterator[str]:
    parts = path.relative_to(package).with_suffix("").parts
    owner = parts[0]
    if owner == "__init__":  # the public surface gathers names from every layer
        return
    folder = [package.name, *parts[:-1]]
    for node, in_function in _walk(ast.parse(path.read_text(), str(path)), False):
        complaints = [_judge(owner, target, in_function) for target in _imported(node, folder, package.name)]
        if owner in DEVICE_FREE and (asked := _device_question(node)):
            complaints.append(f"{owner} asks for a device: {asked}")
        if owner != "shim" and (name := _private_torch(node)):
            complaints.append(f"{name} is private to torch: give it a name in shim")
        for complaint in filter(None, complaints):
            yield f"{path}:{getattr(node, 'lineno', 0)}: {complaint}"


def _judge(owner: str, target: str, in_function: bool) -> str | None:
    if owner == target:
        return None
    for name in (owner, target):
        if name not in RANK and name != "kernels":
            return f"{name} has no layer: add it to LAYERS in tools/import_direction.py"
    if owner == "kernels":
        allowed = target in KERNELS_MAY_IMPORT
    elif target == "kernels":
        allowed = owner in MAY_LOAD_KERNELS and in_function
    else:
        allowed = RANK[target] < RANK[owner] or (owner in BASE and target in BASE)
    return None if allowed else f"{owner} must not import {target}"


def _walk(node: ast.AST, in_function: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, in_function
        yield from _walk(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def _imported(node: ast.AST, folder: list[str], package: str) -> Iterator[str]:
    """The modules and folders right under the package that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = folder[: len(folder) + 1 - node.level] if node.level else []
        base = base + (node.module.split(".") if node.module else [])
        names = [[*base, alias.name] for alias in node.names]
    else:
        return
    for name in names:
        if name[0] == package and len(name) > 1:
            yield name[1]


def _device_question(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        if text in DEVICE_MODULES or node.attr in {"is_cuda", "get_device_capability"}:
            return text
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        for alias in node.names:
            full = f"{module}.{alias.name}" if module else alias.name
            if full in DEVICE_MODULES or module in DEVICE_MODULES or full == "tpfuse.target.Target":
                return f"import of {full}"
    return None


def _private_torch(node: ast.AST) -> str | None:
    """A private name of torch that the node spells out; operators (torch.ops.aten._scaled_mm) are public by their schema."""
    if isinstance(node, ast.Attribute):
        names = [ast.unparse(node)]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return None
    for name in names:
        root, *parts = name.split(".")
        private = [part for part in parts if part.startswith("_") and not part.endswith("__")]
        if root == "torch" and private and parts[0] != "ops":
            # Of a chain the walk visits every prefix: complain of the one that ends in the private name.
            if isinstance(node, ast.Attribute) and (len(private) > 1 or parts[-1] != private[0]):
                continue
            return name
    return None


if __name__ == "__main__":
    complaints = check_tree(Path(sys.argv[1]) / "tpfuse")
    print("\n".join(complaints) or "imports point one way")
    sys.exit(bool(complaints))
