"""One self-contained HTML page of an explained model: the sites, and every layer's graph before and after."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable
from html import escape

from tpfuse.cli.tables import site_rows, tokens
from tpfuse.report import Event, Line, RangeResult, Report

KINDS = {
    "fused": "tpfuse operator", "comm": "collective", "matmul": "matrix product", "attention": "attention",
    "norm": "norm arithmetic", "view": "view", "plain": "other",
}  # fmt: skip
_PATTERNS = (
    ("fused", r"^tpfuse\."),
    ("comm", r"c10d"),
    ("matmul", r"\b(mm|addmm|bmm|baddbmm|matmul|linear|_scaled_mm)\b"),
    ("attention", r"attention|sdpa|softmax"),
    ("norm", r"\b(rsqrt|mean|pow|native_layer_norm)\b"),
    ("view", r"\b(view|reshape|_unsafe_view|permute|transpose|t|unsqueeze|squeeze|expand|slice|split|getitem|alias|clone)\b"),
)
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def page(report: Report, title: str) -> str:
    """The page.  report: one that `explain` made.  title: what was explained."""
    fired, declined = len(report.fired()), len(report.declined())
    collectives = sum(e.attributes.get("operator") in ("all_reduce", "reduce_scatter") for e in report.declined())
    figures = {"fused": fired, "all-reduces left as they were": collectives, "declined": declined}
    body = "".join(f'<div class="card"><b>{n}</b>{t}</div>' for t, n in figures.items())
    graphs = "".join(_graph(r, report.shared) for r in report.results)
    legend = "".join(f'<span class="{k}">{t}</span>' for k, t in KINDS.items())
    return _PAGE.format(
        title=escape(title), style=_STYLE, cards=body, sites=_sites(report), legend=legend, graphs=graphs, script=_SCRIPT
    )


def kind(operator: str) -> str:
    """The colour of an operator, a key of KINDS."""
    return next((name for name, pattern in _PATTERNS if re.search(pattern, operator)), "plain")


def layer_of(site: str) -> str:
    """`model.layers.3` for everything in it; the site itself outside of numbered layers."""
    found = _LAYER.match(site)
    return found.group(1) if found else site


def _sites(report: Report) -> str:
    rows = []
    for (status, *cells), count in site_rows(json.loads(report.to_json())["events"]).items():
        plain = "".join(f"<td>{_code(c) if i in (0, 1) else escape(c)}</td>" for i, c in enumerate(cells))
        rows.append(f"<tr><td>{_badge(status)}</td>{plain}<td class=number>{count}</td></tr>")
    return "".join(rows)


def _graph(result: RangeResult, shared: Iterable[Event]) -> str:
    before, after = _by_layer(result.before), _by_layer(result.after)
    events: dict[str, list[Event]] = {}
    for event in [*shared, *result.events]:
        events.setdefault(layer_of(event.site), []).append(event)
    ops = Counter(result.ops)
    told = ", ".join(f"{n} × {name}" for name, n in sorted(ops.items())) or "no tpfuse operator"
    first = next((name for name in before if any(e.status == "fired" for e in events.get(name, []))), None)
    layers = "".join(
        _layer(name, before.get(name, []), after.get(name, []), events.get(name, []), name == first)
        for name in dict.fromkeys([*before, *after])
    )
    limits = tokens([result.range.start, result.range.end])
    size = f"{len(result.before)} → {len(result.after)} nodes"
    return f"<h2>Graph {result.graph}, tokens {limits}</h2><p>{escape(told)} · {size}</p>{layers}"


def _by_layer(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by layer, in program order; a node of no layer (a getitem, a wait) stays with the one before it."""
    layers: dict[str, list[Line]] = {}
    current = "(inputs)"
    for line in lines:
        current = layer_of(line.site) or current
        layers.setdefault(current, []).append(line)
    return layers


def _layer(name: str, before: list[Line], after: list[Line], events: list[Event], is_open: bool) -> str:
    statuses = Counter(e.status for e in events if e.status != "lowered")
    badges = "".join(_badge(s, n) for s, n in statuses.items())
    reasons = "".join(
        f"<li>{_badge(e.status)} {_code(e.rule)} at {_code(e.site or '(graph)')}: {escape(str(e.reason))}</li>"
        for e in events
        if e.reason
    )
    left, right = _columns(before, after)
    return (
        f"<details{' open' if is_open else ''}><summary><code>{escape(name)}</code>{badges}"
        f"<span class=size>{len(before)} → {len(after)} nodes</span></summary>"
        f"<ul>{reasons}</ul><div class=columns><div><h3>before</h3><pre>{left}</pre></div>"
        f"<div><h3>after</h3><pre>{right}</pre></div></div></details>"
    )


def _columns(before: list[Line], after: list[Line]) -> tuple[str, str]:
    """Both sides as coloured lines; those that only one side has are marked."""
    keys = [[(line.operator, line.shape) for line in lines] for lines in (before, after)]
    gone, new = set(range(len(before))), set(range(len(after)))
    for a, b, size in difflib.SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        gone -= set(range(a, a + size))
        new -= set(range(b, b + size))
    left = "".join(_line(line, "gone" if i in gone else "") for i, line in enumerate(before))
    right = "".join(_line(line, "new" if i in new else "") for i, line in enumerate(after))
    return left, right


def _line(line: Line, mark: str) -> str:
    shape = f"<i>: {escape(line.shape)}</i>" if line.shape else ""
    operator = line.operator.removeprefix("aten.").removesuffix(".default")
    arguments = line.arguments if len(line.arguments) < 160 else line.arguments[:157] + "…"
    return (
        f'<span class="line {mark}" title="{escape(line.site)}">{escape(line.name)}{shape} = '
        f'<span class="{kind(line.operator)}">{escape(operator)}</span>({escape(arguments)})</span>'
    )


def _badge(status: str, count: int = 0) -> str:
    return f'<span class="badge {status}">{f"{count} " if count else ""}{status}</span>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


_STYLE = """
:root { --ink: #1c2128; --soft: #5f6b7a; --paper: #f6f7f9; --box: #fff; --rule: #dde2e8; --green: #1a7f43; --amber:
  #9a6200; --red: #c0362c; --blue: #2563c9; --violet: #7a3fc2; --teal: #0b7a84; --greenish: #e4f5ea; --reddish:
  #fdecea; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ec; --soft: #93a0b0; --paper: #12161b; --box: #1a2027;
  --rule: #2f3843; --green: #56d283; --amber: #e3b04b; --red: #ff8a80; --blue: #7db4ff; --violet: #c9a0ff; --teal:
  #5ed0d9; --greenish: #163524; --reddish: #3d2020; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1500px; padding: 28px; background: var(--paper); color: var(--ink); font: 15px/1.5
  system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 }
h2 { font-size: 18px; margin: 36px 0 4px }
h3 { font-size: 12px; margin: 0 0 6px; color: var(--soft); text-transform: uppercase; letter-spacing: .06em }
p { margin: 2px 0 14px; color: var(--soft) }
code, pre { font: 12.5px/1.6 ui-monospace, SFMono-Regular, Menlo, monospace }
.cards { display: flex; gap: 14px; margin: 20px 0 }
.card { background: var(--box); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 20px; color:
  var(--soft) }
.card b { display: block; font-size: 28px; line-height: 1.2; color: var(--ink) }
table { width: 100%; border-collapse: collapse; background: var(--box); border: 1px solid var(--rule); border-radius:
  10px; overflow: hidden }
th, td { text-align: left; padding: 7px 12px; border-top: 1px solid var(--rule); vertical-align: top; overflow-wrap:
  anywhere }
th { font-size: 12px; color: var(--soft); border-top: 0; white-space: nowrap }
td:nth-child(-n + 5) { overflow-wrap: normal }
.number { text-align: right }
.badge { display: inline-block; border-radius: 20px; padding: 0 10px; margin-right: 6px; font-size: 12px; line-height:
  20px; white-space: nowrap; border: 1px solid currentColor }
.badge.fired { color: var(--green) }
.badge.declined, .badge.unfused { color: var(--amber) }
.badge.lowered { color: var(--teal) }
.legend { margin: 8px 0 }
.legend span { margin-right: 18px; font: 12.5px ui-monospace, monospace }
details { background: var(--box); border: 1px solid var(--rule); border-radius: 10px; margin: 8px 0 }
summary { cursor: pointer; padding: 9px 14px }
summary code { font-size: 14px; margin-right: 14px }
.size { color: var(--soft); font-size: 13px }
ul { margin: 0; padding: 0 16px 6px; list-style: none; font-size: 13.5px }
li { margin: 3px 0 }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; padding: 6px 14px 14px }
.columns > div { min-width: 0 }
pre { margin: 0; overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; padding: 6px 0 }
.line { display: block; padding: 0 10px; white-space: pre; min-width: max-content; border-left: 3px solid transparent
  }
i { color: var(--soft); font-style: normal }
.gone { background: var(--reddish); border-color: var(--red) }
.new { background: var(--greenish); border-color: var(--green) }
.fused { color: var(--green); font-weight: 700 }
.comm { color: var(--red); font-weight: 700 }
.matmul { color: var(--violet); font-weight: 600 }
.attention { color: var(--teal); font-weight: 600 }
.norm { color: var(--blue) }
.view { color: var(--soft) }
button { font: inherit; font-size: 13px; color: var(--ink); background: var(--box); border: 1px solid var(--rule);
  border-radius: 8px; padding: 3px 12px; margin-right: 8px; cursor: pointer }
@media (max-width: 900px) { .columns { grid-template-columns: 1fr } }
"""
_SCRIPT = "const all = o => document.querySelectorAll('details').forEach(d => { d.open = o })"
_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>tpfuse explain · {title}</title><style>{style}</style>
<h1>tpfuse explain</h1><p>{title}</p><div class=cards>{cards}</div>
<h2>Sites</h2><p>Every collective, norm and quantisation; those that differ in the layer number alone share a row.</p>
<table><tr><th>Status<th>Rule or operator<th>Site<th>Tokens<th>Kernel<th>Reason<th>Sites</tr>{sites}</table>
<h2>Layers</h2><div class=legend>{legend}</div>
<button onclick="all(true)">open all</button><button onclick="all(false)">close all</button>
{graphs}<script>{script}</script></html>
"""
