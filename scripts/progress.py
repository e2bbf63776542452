"""Progress bars of long work, one for each of its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Show = Callable[[str, int, int], None]  # (stage, done, total)


@contextmanager
def stages(console: Console, disable: bool = False) -> Iterator[tuple[Show, Console]]:
    """What to tell of progress, and the console to print on above the bars."""
    columns = (
        TextColumn("{task.description:12}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=disable) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show, bars.console
