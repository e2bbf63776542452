"""Where an engine directory is made: beside its place under another name, until all of it is there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fp8.builder.engine import unwritable


class BuildError(ValueError):
    """A flag or a directory with which no engine can be built: what was found, what is expected."""


def check_output(output: Path) -> None:
    """Raises BuildError unless `output` is new, empty, or an engine directory, which is replaced."""
    if output.is_dir() and (not any(output.iterdir()) or (output / "rank0.engine").is_file()):
        return
    if output.exists():
        raise BuildError(f"{output} exists and is no engine directory; remove it, or choose another --output_dir")


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """`<output>.partial`, renamed to `output` on success, removed on any failure."""
    check_output(output)
    partial, replaced = (output.with_name(f"{output.name}.{end}") for end in ("partial", "replaced"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            os.replace(output, replaced)
        os.replace(partial, output)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        _undo(output, partial, replaced)
        raise BuildError(unwritable(output, error)) from error
    except BaseException:
        _undo(output, partial, replaced)
        raise


def _undo(output: Path, partial: Path, replaced: Path) -> None:
    if replaced.exists() and not output.exists():  # stopped between the two renames
        os.replace(replaced, output)
    shutil.rmtree(partial, ignore_errors=True)
