"""A pytest plugin that writes what passed on this machine's GPUs into a result file, beside what other tests said there earlier.

    TPFUSE_RECORD=benchmarks/results/gpu_tests-h100-2.json pytest -p tests.gpu.record tests/gpu

A row is a test with all its parameters: {"test", "passed", "failed", "skipped", "seconds", "commit", "date", "count", "torch"}.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

OUTCOMES = ("passed", "failed", "skipped")
_reports: list[tuple[str, str, float]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":  # a failure or a skip while it is set up
        _reports.append((report.nodeid, report.outcome, report.duration))


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("TPFUSE_RECORD")
    if path and _reports and not hasattr(session.config, "workerinput"):  # of the processes of xdist the first
        from tpfuse.measure import results

        here = results.environment()
        now = {
            "commit": os.environ.get("TPFUSE_COMMIT") or results.commit(), "date": datetime.date.today().isoformat(),
            "count": here["machine"]["count"], "torch": here["versions"]["torch"],
        }  # fmt: skip
        old = json.loads(Path(path).read_text())["rows"] if Path(path).exists() else []
        results.write(path, results.document("gpu_tests", merged(old, rows(_reports, now)), **here))


def rows(reports: Iterable[tuple[str, str, float]], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each test.  reports: (its id with parameters, outcome, seconds)."""
    counts: dict[str, Counter[str]] = {}
    seconds: Counter[str] = Counter()
    for name, outcome, duration in reports:
        test = name.partition("[")[0]
        counts.setdefault(test, Counter())[outcome] += 1
        seconds[test] += duration
    return [{"test": t, **{o: n[o] for o in OUTCOMES}, "seconds": round(seconds[t], 1), **now} for t, n in counts.items()]


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known of each test by its last run, sorted by name."""
    return sorted({row["test"]: row for row in (*old, *new)}.values(), key=lambda row: row["test"])
