"""Draw the plots that stand beside the result files under benchmarks/results.

    python tools/plots.py [FILE …]      # default: those of every file that has one

`tables.py` then puts the plots of each file below its table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tpfuse.cli import plots

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


DRAWN = {"collectives": plots.save, "gemm": plots.save, "e2e": plots.save_e2e}


def main(files: list[Path]) -> None:
    for path in files or [f for f in sorted(RESULTS.glob("*.json")) if any(RESULTS.glob(f"{f.stem}*.svg"))]:
        document = json.loads(path.read_text())
        for drawn in DRAWN[document["what"]](document, path):
            print(drawn)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
