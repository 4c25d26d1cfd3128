"""Which table of measurements counts in this process."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping

from tpfuse.config import Config, table_path
from tpfuse.lowering.table import BUILT_IN, Table
from tpfuse.report import Event
from tpfuse.runtime import agreement
from tpfuse.runtime.detect import detect, machine

log = logging.getLogger("tpfuse")


def table_of(config: Config, machine: str, versions: Mapping[str, str]) -> tuple[Table, list[Event]]:
    """The table that the config names, else the one that `tpfuse tune` left for this machine, else the built-in one.

    A table that was measured on another machine or with other versions is reported; one that nobody named is then not used.
    """
    path = config.table or (str(table_path(machine)) if table_path(machine).exists() else None)
    if path is None:
        return BUILT_IN, []
    table = Table.load(path)
    stale = table.stale(machine, versions)
    if stale is None:
        return table, []
    return table if config.table else BUILT_IN, [Event("declined", "table", reason=stale)]


def follow_first(table: Table, groups: Iterable[tuple[int, ...]], timeout: float) -> Table:
    """The table of the first rank of each group, all of which this rank belongs to: hosts may have different files.

    Ranks of several groups hand on what they took, so that all ranks of a graph end with the same one.  Collective.
    """
    for ranks in sorted(groups):
        table = Table.parse(agreement.follow(ranks, table.to_json(), timeout))
    return table


@functools.cache
def table_of_group(device: str, group: str | None) -> Table:
    """The table for operators that are called directly, by the environment's settings.  Collective at a group's first call."""
    if device != "cuda":
        return BUILT_IN
    config = Config.of(None)
    table, events = table_of(config, machine(device), detect(device, group).versions)
    for event in events:
        log.warning("%s", event.reason)
    return follow_first(table, [agreement.group_ranks(group)], config.timeout) if group else table
