"""`tpfuse explain`: the report of a model that need not be there, from its configuration alone."""

from __future__ import annotations

from json import loads
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from tpfuse import shim
from tpfuse.cli import models, tables
from tpfuse.cli.inputs import BadInput, writable
from tpfuse.cli.launch import cause
from tpfuse.cli.page import page
from tpfuse.compiler import explain
from tpfuse.config import Config
from tpfuse.files import write
from tpfuse.report import Report
from tpfuse.target import Target

_TOKENS = 24  # what the dynamic graph is captured with; any number from 2 on


def plan(path: str, tp: int, dtype: str, target: Target, config: Config) -> tuple[Report, str]:
    """What would happen on `tp` ranks of `target` → (report, the model's name).  Raises BadInput.

    One process stands for rank 0; the model has no weights and no kernel runs.
    """
    source = models.locate(path)
    models.quiet()
    found = models.read_config(source)
    models.check_ranks(found, tp)
    if not dist.is_initialized():
        shim.join_fake_group(tp)
    try:
        model = models.build(found, tp, models.DTYPES[dtype])
        ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
        report = explain(model, input_ids=ids, use_cache=False, config=config, target=target)
    except shim.TorchDynamoException as error:
        if cause(error) is not error:  # raised below torch: it speaks for itself
            raise
        told = " ".join(str(error).split("\n\n")[0].split())
        raise BadInput(f"{path}: torch {torch.__version__} cannot trace this model on {tp} ranks: {told}") from error
    finally:
        dist.destroy_process_group()
    return report, source.gguf or source.folder.name


def run(
    console: Console, path: str, tp: int, dtype: str, target: Target, config: Config, html: Path | None, json: Path | None
) -> None:
    """The command: see `tpfuse explain --help`.  FusionError under `strict`, after nothing was written."""
    writable(json, html)
    with console.status("tracing the model"):  # as long as torch takes, half a minute for 30 layers
        report, name = plan(path, tp, dtype, target, config)
    told = f"{name}, {tp} ranks, {dtype}, {target.device}{f' sm_{target.sm}' if target.sm else ''}"
    console.print(f"[bold]{told}[/bold]", highlight=False)
    tables.show_report(console, loads(report.to_json()))
    if json:
        write(json, report.to_json())
    if html:
        write(html, page(report, told))


