"""The command `tpfuse`."""

from __future__ import annotations

import enum
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import tpfuse

app = typer.Typer(
    help="Graph fusions for tensor-parallel LLM inference under torch.compile.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"tpfuse {tpfuse.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass  # the application's help is the text given above


class Device(enum.StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Dtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LowDtype(enum.StrEnum):
    """What collective kernels move."""

    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder or a GGUF file.")]
Ranks = Annotated[int | None, typer.Option("--tp", min=1, help="Ranks to shard over; under torchrun, the ranks it started.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A field of tpfuse.Config: fuel=5, disable_passes=async_tp … Repeatable."),
]  # fmt: skip
World = Annotated[int, typer.Option("--world", "--tp", min=2, help="Ranks, a GPU each.")]
Tokens = Annotated[str | None, typer.Option(metavar="N,N,…", help="Token counts, of all ranks together.")]
Hidden = Annotated[str | None, typer.Option(metavar="N,N,…", help="Widths.")]
Schemes = Annotated[str | None, typer.Option("--scheme", metavar="NAME,NAME,…", help="Quantisations; none among them.")]
Trials = Annotated[int, typer.Option(min=1, help="Replays of each graph, at most.")]
Marked = Annotated[Path | None, typer.Option("--table", metavar="FILE", help="A tuned table: what it picks is marked.")]
Limit = Annotated[float | None, typer.Option("--limit-s", min=0, help="Seconds after which no further point begins.")]
ResultFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write a result file.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a plot, as PNG and as SVG.")]
Commit = Annotated[str | None, typer.Option("--commit", help="The commit measured; default: git's.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail when an expected fusion did not happen.")]


@app.command()
def run(
    model: Model,
    tp: Ranks = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "The capital of France is",
    device: Annotated[Device | None, typer.Option(help="Default: cuda where there is one.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: float32 on cpu, bfloat16 on cuda.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, greedily.")] = 20,
    no_fuse: Annotated[bool, typer.Option("--no-fuse", help="Plain Inductor, without tpfuse.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check every fused site against its unfused body.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run unfused and unsharded, and show times, texts and errors.")
    ] = False,
    strict: Strict = False,
    settings: Set = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Run a model tensor-parallel: generate text, show every site, time to first token and time per token."""
    from tpfuse.cli import run as command
    from tpfuse.cli.inputs import read_config

    config = read_config(settings or (), verify=verify, strict=strict)
    command.run(
        _console(), model, tp, prompt, device and device.value, dtype and dtype.value, max_new_tokens, not no_fuse, compare,
        config, json,
    )  # fmt: skip


@app.command()
def explain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder (config.json is enough) or a GGUF file.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks to shard over.")],
    device: Annotated[Device, typer.Option(help="Where it would run.")] = Device.cpu,
    sm: Annotated[int, typer.Option(min=50, help="Compute capability of --device cuda: 90, 100 …")] = 90,
    dtype: Annotated[Dtype, typer.Option(help="The model's.")] = Dtype.bfloat16,
    strict: Strict = False,
    settings: Set = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page with the graph before and after.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
) -> None:
    """Show what would be fused, and what not and why, without weights, ranks or GPUs."""
    from tpfuse.cli import explain as command
    from tpfuse.cli.inputs import read_config
    from tpfuse.target import Target

    gpu = Target("cuda", sm, tp, peer_access=True, backends=frozenset({"reference", "triton", "cuda", "torch", "nccl"}))
    target = gpu if device == Device.cuda else Target("cpu", world=tp)
    config = read_config(settings or (), strict=strict)
    command.run(_console(), model, tp, dtype.value, target, config, html, json)


bench = typer.Typer(help="Measure fused against unfused.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def collectives(
    world: World = 2,
    tokens: Tokens = None,
    hidden: Hidden = None,
    scheme: Schemes = None,
    dtype: Annotated[LowDtype, typer.Option(help="Of the rows.")] = LowDtype.bfloat16,
    residual: Annotated[bool, typer.Option(help="Whether a residual is added.")] = True,
    sharded: Annotated[bool, typer.Option("--sharded", help="The form around a residual that is sharded by rows.")] = False,
    trials: Trials = 15,
    baseline: Annotated[str, typer.Option(help="The implementation that speed-ups are relative to.")] = "nccl+inductor",
    eager: Annotated[bool, typer.Option("--eager", help="Also the norm without a compiler.")] = False,
    table: Marked = None,
    limit_s: Limit = None,
    json: ResultFile = None,
    plot: Plot = None,
    commit: Commit = None,
) -> None:
    """All-reduce + norm (+ quantise): tpfuse's kernels beside NCCL, torch's symmetric memory and FlashInfer."""
    from tpfuse.cli import bench as command
    from tpfuse.cli import inputs
    from tpfuse.lowering.table import BUILT_IN

    command.collectives(
        _console(), world, inputs.numbers("--tokens", tokens, command.TOKENS), inputs.numbers("--hidden", hidden, command.HIDDEN),
        inputs.schemes(scheme, command.SCHEMES), dtype.value, residual, sharded, trials, baseline, eager,
        inputs.read_table(table) if table else BUILT_IN, limit_s, json, plot, commit,
    )  # fmt: skip


@bench.command()
def e2e(
    world: World = 2,
    shape: Annotated[str, typer.Option(metavar="NAME,NAME,…", help="8b, 70b, gemma, mla.")] = "8b,70b",
    scheme: Annotated[str, typer.Option(metavar="NAME,NAME,…", help="Of the linear layers; none among them.")] = "none",
    decode: Annotated[str, typer.Option(metavar="N,N,…", help='Sequences that step together; "" for none.')] = "1,8,32,128",
    prefill: Annotated[str, typer.Option(metavar="N,N,…", help='Tokens of one sequence; "" for none.')] = "2048,8192",
    serve: Annotated[
        str, typer.Option(metavar="PROMPT:BATCH:SEQUENCES,…", help="Loads: prompts, prefilled so many at a time, of so many.")
    ] = "",
    output: Annotated[int, typer.Option(min=2, help="Tokens that each sequence of a load gets.")] = 64,
    layers: Annotated[str, typer.Option(help='Layers of the stack; "max": as many as fit, at most the model\'s.')] = "4",
    cached: Annotated[int, typer.Option(min=1, help="Positions that a decode step reads.")] = 1024,
    trials: Annotated[int, typer.Option(min=1, help="Samples of each step.")] = 15,
    without: Annotated[str, typer.Option(metavar="NAME,NAME,…", help="Implementations to leave out.")] = "",
    table: Annotated[Path | None, typer.Option(metavar="FILE", help="A tuned table.")] = None,
    limit_s: Limit = None,
    json: ResultFile = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write plots of steps and loads, as PNG and as SVG.")] = None,
    commit: Commit = None,
) -> None:
    """Stacks shaped like models under torch.compile: tpfuse, NCCL, torch's async TP, FlashInfer, and no collectives at all."""
    from tpfuse.cli import bench_e2e as command
    from tpfuse.cli import inputs

    command.e2e(
        _console(), world, shape.split(","), inputs.schemes(scheme, ()), inputs.numbers("--decode", decode, (), or_none=True),
        inputs.numbers("--prefill", prefill, (), or_none=True), command.loads_of(serve, output), command.layers_of(layers),
        cached, trials, without.split(",") if without else [], table, limit_s, json, plot, commit,
    )  # fmt: skip


@bench.command()
def gemm(
    world: World = 2,
    operator: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="The products.")
    ] = "matmul_reduce_scatter,all_gather_matmul",
    tokens: Tokens = None,
    size: Annotated[str, typer.Option(metavar="HIDDENxINTERMEDIATE,…", help="Of the layers.")] = "4096x14336,8192x28672",
    scheme: Schemes = None,
    dtype: Annotated[LowDtype, typer.Option(help="Of the sums.")] = LowDtype.bfloat16,
    trials: Trials = 15,
    table: Marked = None,
    limit_s: Limit = None,
    json: ResultFile = None,
    plot: Plot = None,
    commit: Commit = None,
) -> None:
    """Products next to a collective: tpfuse's kernels, NCCL with cuBLAS, torch's fused operators, and the product alone."""
    from tpfuse.cli import bench_gemm as command
    from tpfuse.cli import inputs
    from tpfuse.lowering.table import BUILT_IN

    command.bench(
        _console(), world, operator.split(","), inputs.numbers("--tokens", tokens, command.TOKENS),
        inputs.pairs("--size", size, "HIDDENxINTERMEDIATE, such as 4096x14336"), inputs.schemes(scheme, command.SCHEMES),
        dtype.value, trials, inputs.read_table(table) if table else BUILT_IN, limit_s, json, plot, commit,
    )  # fmt: skip


@app.command()
def tune(
    world: Annotated[int, typer.Option("--world", "--tp", min=1, help="Ranks, a GPU each; one measures --head-dims alone.")] = 2,
    tokens: Annotated[str | None, typer.Option(metavar="N,N,…", help='Of the all-reduces; "" for none.')] = None,
    hidden: Hidden = None,
    scheme: Schemes = None,
    dtype: Annotated[LowDtype, typer.Option(help="Of the rows.")] = LowDtype.bfloat16,
    residual: Annotated[
        bool, typer.Option("--residual/--both", help="Norms with a residual alone, or also those without.")
    ] = True,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Also from which size on residuals are better kept sharded.")
    ] = False,
    intermediate: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Of the layers, one a width: also products next to collectives.")
    ] = None,
    product_tokens: Annotated[str | None, typer.Option(metavar="N,N,…", help="Token counts of the products.")] = None,
    head_dims: Annotated[
        str | None, typer.Option(metavar="QKxV,…", help="Widths of heads: also attention whose rows are quantised by --scheme.")
    ] = None,
    flashinfer: Annotated[
        bool, typer.Option("--flashinfer/--no-flashinfer", help="Measure it where it is installed; building it takes minutes.")
    ] = True,
    trials: Trials = 15,
    limit_s: Limit = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The table; default: where this machine's is found.")] = None,
    samples: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write everything that was measured.")] = None,
) -> None:
    """Measure which kernel is fastest at which size on this machine, for lowering to pick by."""
    from tpfuse.cli import inputs
    from tpfuse.cli import tune as command

    command.run(
        _console(), world, inputs.numbers("--tokens", tokens, command.TOKENS, or_none=True),
        inputs.numbers("--hidden", hidden, command.HIDDEN), inputs.schemes(scheme, command.SCHEMES), dtype.value,
        (True,) if residual else (True, False), sequence_parallel, inputs.numbers("--intermediate", intermediate, ()),
        inputs.numbers("--product-tokens", product_tokens, command.PRODUCT_TOKENS),
        inputs.pairs("--head-dims", head_dims, "QKxV, such as 128x128"), flashinfer, trials, limit_s, out, samples,
    )  # fmt: skip


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, links and back ends: what is usable and why not."""
    from json import dumps

    from tpfuse.cli import doctor as command

    facts = command.examine()
    if json:
        print(dumps(command.as_json(facts), indent=1))
    else:
        command.show(_console(), facts)


def _console() -> Console:
    """Where there is neither a terminal to ask nor COLUMNS, lines are as long as tables need."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=160)


def main() -> None:
    """The command line; errors that were foreseen end it with one message and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # "?" where a locale lacks a character
            stream.reconfigure(errors="replace")
    try:
        app()
    except Exception as wrapped:
        from tpfuse.cli.inputs import BadInput
        from tpfuse.cli.launch import RankError, cause
        from tpfuse.report import FusionError

        error = cause(wrapped)
        if not isinstance(error, BadInput | FusionError | RankError | OSError):
            raise
        console = Console(stderr=True)
        if isinstance(error, RankError) and error.details:
            console.print(error.details.rstrip(), style="dim", highlight=False, markup=False)
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
