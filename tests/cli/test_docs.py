"""docs/commands.md describes every command and option that there is, and none that there is not."""

import re
from pathlib import Path

import typer

from tpfuse.cli.__main__ import app

TEXT = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()


def leaves(command, name=""):
    """(name, options) of each command; of a switch that can be turned off, both names."""
    if hasattr(command, "commands"):
        for key, inner in command.commands.items():
            yield from leaves(inner, f"{name} {key}".strip())
    else:
        yield name, {tuple(p.opts + p.secondary_opts) for p in command.params if p.opts[0].startswith("--")} - {("--help",)}


COMMANDS = dict(leaves(typer.main.get_command(app)))


def test_every_option_stands_in_its_commands_section():
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
    assert set(sections) == set(COMMANDS)
    for name, options in COMMANDS.items():
        words = set(re.findall(r"--[a-z0-9-]+", sections[name]))
        known = {spelling for option in options for spelling in option}
        assert words <= known, f"{name}: {words - known}"
        missing = [option for option in options if not words & set(option)]
        assert not missing, f"{name}: {missing}"
