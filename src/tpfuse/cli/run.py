"""`tpfuse run`: check the input, start the ranks, show what came out."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tpfuse.cli import models, tables
from tpfuse.cli.generate import FUSED, UNFUSED, Job, Outcome, work
from tpfuse.cli.inputs import BadInput, cxx, writable
from tpfuse.cli.launch import Place, launch
from tpfuse.config import Config
from tpfuse.files import write


def prepare(path: str, tp: int, prompt: str, new: int, device: str, dtype: str, here: int, bars: Bars) -> Path:
    """The folder to load, after everything that can be known wrong before a rank starts.  BadInput says what is.

    new: tokens to generate.  here: ranks on this host.
    """
    source = models.locate(path)
    if device == "cuda" and here > torch.cuda.device_count():
        raise BadInput(f"--tp {tp}, but {torch.cuda.device_count()} GPUs are visible")
    if device == "cpu":
        cxx()
    models.quiet()
    bars("loading", 0, 3)
    if source.gguf:
        target = models.converted(source, models.DTYPES[dtype])
        source = models.Source(target) if target.is_dir() else source
    models.check_files(source)
    config = models.read_config(source)
    models.check_ranks(config, tp)
    folder = models.dequantised(source, models.DTYPES[dtype]) if source.gguf else source.folder
    models.check_prompt(folder, config, prompt, new)
    return folder


def run(
    console: Console,
    path: str,
    tp: int | None,
    prompt: str,
    device: str | None,
    dtype: str | None,
    max_new_tokens: int,
    fuse: bool,
    compare: bool,
    config: Config,
    output: Path | None,
) -> None:
    """The command: see `tpfuse run --help`.  Raises BadInput, RankError, TimeoutError or FusionError."""
    place = Place.of_torchrun()
    tp = tp or (place.world if place else 1)
    if place and place.world != tp:
        raise BadInput(f"--tp {tp}, but {place.world} ranks were started")
    if compare and not fuse:
        raise BadInput("--compare shows the fused run beside the unfused one: leave out --no-fuse")
    if not fuse and (config.verify or config.strict):
        raise BadInput("--verify and --strict are about fused sites: leave out --no-fuse")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    variants = ((FUSED,) if fuse else ()) + ((UNFUSED,) if compare or not fuse else ())
    leads = place is None or place.rank == 0
    writable(output if leads else None)
    with Bars(console, leads) as bars:
        folder = prepare(path, tp, prompt, max_new_tokens, device, dtype, place.local_world if place else tp, bars)
        job = Job(folder, tp, prompt, device, dtype, max_new_tokens, variants, compare, config)
        if place:
            os.environ.update(place.environment())
            outcome = work(place, bars, job)
        else:
            outcome = launch(work, tp, job, progress=bars, silence=1.5 * config.timeout)[0]
    if not leads:
        return
    tables.show_outcome(console, outcome, prompt)
    if output:
        write(output, json.dumps(as_json(outcome, job, path), indent=1))


def as_json(outcome: Outcome, job: Job, model: str) -> dict[str, Any]:
    """Everything that was printed, and the job."""
    told = asdict(outcome)
    told.pop("summary")
    return {
        "model": model, "tp": job.tp, "device": job.device, "dtype": job.dtype,
        "prompt": job.prompt, "max_new_tokens": job.max_new_tokens, "torch": torch.__version__, "config": asdict(job.config),
        **told,
    }  # fmt: skip


class Bars:
    """Progress bars, one a stage; nothing where the console is no terminal or this rank is not the one that shows."""

    def __init__(self, console: Console, shown: bool) -> None:
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        kind = stage.split()[0]
        if kind not in self.tasks:
            self.tasks[kind] = self.bars.add_task(stage, total=total or None)
        self.bars.update(self.tasks[kind], description=stage, completed=done, total=total or None)
