"""benchmarks/again.py: each of its steps is a command that there is."""

import click
import pytest
import typer

from benchmarks import again
from tpfuse.cli.__main__ import app


@pytest.mark.parametrize("step", again.STEPS)
def test_steps(step, tmp_path):
    _, module, name, *given = again.command(step, tmp_path, "h100", 2, "abc1234")
    assert (module, name) == ("-m", "tpfuse.cli")
    command = typer.main.get_command(app)
    context = click.Context(command)
    while hasattr(command, "resolve_command"):
        _, command, given = command.resolve_command(context, given)
    found = command.make_context(step, given).params  # an option that there is not, or a bad value, raises
    assert found["world"] == 2 and found["limit_s"] == again.STEPS[step].seconds
    assert str(tmp_path / f"{step}-h100-2.json") in map(str, found.values())
