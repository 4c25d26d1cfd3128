"""Fuzz for a time: `python -m tests.fuzz --seconds N --seed S`; one model again: `--seed S --count 1 --show`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.generate import generate
from tests.fuzz.minimise import minimised
from tests.fuzz.oracle import Verdict, gathered, judge, tally
from tests.fuzz.program import Program
from tpfuse.testing import RankPool

BATCH = 8  # models between two reports


def judged(pool: RankPool, programs: list[Program]) -> list[Verdict]:
    """Verdicts on programs.  What ends or hangs a rank is the problem of the one it was at; the rest begins anew behind it."""
    with tempfile.TemporaryDirectory() as folder:
        progress = str(Path(folder) / "at")
        limit = 60 + sum(120 if program.settings.front == "inductor" else 15 for program in programs)
        try:
            return gathered(pool.run(judge, programs, progress, timeout=limit))
        except (TimeoutError, ChildProcessError) as error:
            if len(programs) == 1:
                return [Verdict(programs[0].seed, f"hang: {error}")]
            return [verdict for program in programs for verdict in judged(pool, [program])]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first model; the next has the next")
    parser.add_argument("--seconds", type=float, default=60, help="begin no model after so long")
    parser.add_argument("--count", type=int, default=1 << 30, help="at most so many models")
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument("--inductor", type=int, default=0, help="every so-manieth model compiled by Inductor, 0 for none")
    parser.add_argument("--front", default="", choices=["", "traced", "dynamo", "inductor"], help="the same for every model")
    parser.add_argument("--show", action="store_true", help="print every model")
    parser.add_argument("--keep", action="store_true", help="print models that fail as they are, not made smaller")
    options = parser.parse_args(arguments)
    start, verdicts, failures = time.monotonic(), [], 0
    with RankPool(options.world) as pool:
        seed = options.seed
        while time.monotonic() - start < options.seconds and seed < options.seed + options.count:
            seeds = range(seed, min(seed + BATCH, options.seed + options.count))
            seed = seeds.stop
            whole = [bool(options.inductor) and s % options.inductor == 0 for s in seeds]
            programs = [generate(s, options.world, "inductor" if w else options.front) for s, w in zip(seeds, whole, strict=True)]
            for program, verdict in zip(programs, found := judged(pool, programs), strict=True):
                if options.show:
                    print(f"{program.settings}\n{program.source()}\n{verdict}", flush=True)
                if verdict.problem:
                    failures += 1
                    print(f"\nseed {program.seed}: {verdict.problem}", flush=True)
                    small = program if options.keep else minimised(pool, program, verdict, judged)
                    print(f"{small.settings}\n{small.source()}", flush=True)
            verdicts += found
    rewritten = sum(v.fired > 0 for v in verdicts)
    print(f"\nworld {options.world}, seeds {options.seed} to {seed - 1}: {len(verdicts)} models in "
          f"{time.monotonic() - start:.0f} s, {rewritten} of them rewritten, {failures} wrong, "
          f"{sum(bool(v.own) for v in verdicts)} wrong without tpfuse", flush=True)  # fmt: skip
    for own, count in Counter(v.own[:150] for v in verdicts if v.own).items():
        print(f"  {count:5} {own}")
    for name, count in sorted(Counter(tally(verdicts)).items()):
        print(f"  {count:5} {name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
