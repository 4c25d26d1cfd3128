"""What the command line prints: runs, sites, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tpfuse.cli import fit
from tpfuse.cli.generate import SINGLE, Outcome
from tpfuse.report import numberless

STYLES = {"fired": "green", "declined": "yellow", "unfused": "yellow", "lowered": "cyan"}
UNBOUNDED = 1 << 31


def show_outcome(console: Console, out: Outcome, prompt: str) -> None:
    """The text, the times, the errors, the sites."""
    first = next(iter(out.runs.values()))
    console.print(f"\n[bold]{_escape(prompt)}[/bold]{_escape(first.text)}\n", highlight=False)
    fit.show(console, times(out))
    if out.errors:
        fit.show(console, errors(out))
    if out.report:
        show_report(console, out.report)


def show_report(console: Console, report: Mapping[str, Any]) -> None:
    """A report, in the form of its JSON: the sites, the operators of every graph, what was verified."""
    fit.show(console, sites(report["events"]))
    for row in report["ranges"]:
        console.print(f"graph {row['graph']}, tokens {tokens(row['range'])}: {_counts(row['ops'])}", highlight=False)
    if report["verified"]:
        fit.show(console, verified(report["verified"]))


def times(out: Outcome) -> Table:
    table = Table(title=f"{out.prompt_tokens} prompt tokens, compiled in {out.compile:.1f} s", title_justify="left")
    for name in ("Run", "Time to first token", "Time per token", "Tokens", "Text"):
        table.add_column(name, justify="left" if name in ("Run", "Text") else "right")
    expected = out.runs.get(SINGLE) or next(iter(out.runs.values()))
    for name, run in out.runs.items():
        text = "" if len(out.runs) == 1 else "[green]equal[/green]" if run.tokens == expected.tokens else "[red]differs[/red]"
        each = "–" if run.per_token is None else f"{run.per_token * 1e3:.1f} ms"
        table.add_row(name, f"{run.first_token * 1e3:.1f} ms", each, str(len(run.tokens)), text)
    return table


def errors(out: Outcome) -> Table:
    table = Table(title="Logits against the unsharded model in FP32, along its tokens", title_justify="left")
    for name in ("Run", "Relative error", "Largest difference", "Positions"):
        table.add_column(name, justify="left" if name == "Run" else "right")
    for name, row in out.errors.items():
        table.add_row(name, f"{row['relative']:.3g}", f"{row['maximum']:.3g}", str(int(row["positions"])))
    return table


def sites(events: Iterable[Mapping[str, Any]]) -> Table:
    """Every site: those that differ in nothing but the layer number share a row."""
    table = Table(title="Sites", title_justify="left")
    for name in ("Status", "Rule or operator", "Site", "Tokens", "Kernel", "Reason"):
        table.add_column(name)
    table.add_column("Sites", justify="right")
    for (status, *rest), count in site_rows(events).items():
        style = STYLES.get(status, "")
        table.add_row(f"[{style}]{status}[/{style}]", *map(_escape, rest), str(count))
    return table


def site_rows(events: Iterable[Mapping[str, Any]]) -> Counter[tuple[str, ...]]:
    """How many sites there are of each (status, rule, site without layer number, tokens, kernel, reason).

    events: those of a report's JSON.  A kernel stands with the rule that fired; operators that no rule made get a row.
    """
    events = list(events)
    kernels = {_place(e): str(e["attributes"]["kernel"]) for e in events if "kernel" in e["attributes"]}
    fired = {_place(e) for e in events if e["status"] == "fired"}
    groups: Counter[tuple[str, ...]] = Counter()
    for event in events:
        if event["status"] == "lowered" and (_place(event) in fired or _place(event) not in kernels):
            continue
        reason = event["reason"] or {}
        kernel = kernels.get(_place(event), "") if event["status"] in ("fired", "lowered") else ""
        groups[
            event["status"], event["rule"], numberless(event["site"]), tokens(event["range"]), kernel,
            ": ".join(filter(None, (reason.get("code"), reason.get("detail")))),
        ] += 1  # fmt: skip
    return groups


def verified(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Every checked site's largest error over its calls."""
    table = Table(title="Fused sites against their unfused bodies, errors against FP64", title_justify="left")
    for name in ("Site", "Operator", "Kernel", "Calls", "Error", "Unfused error", "Difference"):
        table.add_column(name, justify="right" if name in ("Calls", "Error", "Unfused error", "Difference") else "left")
    worst: dict[tuple[str, str, str], list[Any]] = {}
    for row in rows:
        entry = worst.setdefault((row["site"], row["operator"], row["kernel"]), [0, 0.0, 0.0, 0.0])
        entry[0] += row["calls"] * (row["result"] == 0)
        for i, name in enumerate(("error", "unfused_error", "max_difference"), 1):
            entry[i] = max(entry[i], row[name])
    for key, (calls, *figures) in worst.items():
        table.add_row(*key, str(calls), *(f"{f:.3g}" for f in figures))
    return table


def _place(event: Mapping[str, Any]) -> tuple[Any, ...]:
    return event["rule"], event["site"], str(event["range"])


def tokens(limits: Any) -> str:
    """Token counts of a range, [start, end] or None."""
    if limits is None:
        return "any"
    start, end = limits
    return str(start) if start == end else f"{start}…" if end >= UNBOUNDED - 1 else f"{start}…{end}"


def _counts(ops: Mapping[str, int]) -> str:
    return ", ".join(f"{n} × {name}" for name, n in ops.items()) or "no tpfuse operator"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
