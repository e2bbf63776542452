"""Where an output directory is made: beside its place under another name, until all of it is there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from fp8.builder.engine import unwritable


class BuildError(ValueError):
    """A flag or a directory with which no engine can be built: what was found, what is expected."""


def check_output(output: Path) -> None:
    """Raises BuildError unless `output` is new, empty, or an engine directory, which is replaced."""
    try:
        _check(output)
    except OSError as error:  # a name that is too long, a directory that may not be listed
        raise BuildError(unwritable(output, error)) from error


def _check(output: Path) -> None:
    if is_here(output):
        raise BuildError(f"{output} is the current directory, which would be replaced; choose another --output_dir")
    if output.is_dir() and (not any(output.iterdir()) or (output / "rank0.engine").is_file()):
        return
    if output.exists():
        raise BuildError(f"{output} exists and is no engine directory; remove it, or choose another --output_dir")


def is_here(output: Path) -> bool:
    """Whether it is the current directory: a shell that stands in it would not see what takes its place."""
    return output.is_dir() and output.samefile(os.curdir)


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """`<output>.partial`, renamed to `output` on success, removed on any failure."""
    check_output(output)
    try:
        with alone(beside(output, "partial")) as partial:
            try:
                recover(output)
                clear(partial)
                yield partial
                put(partial, output)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise BuildError(unwritable(output, error)) from error


def beside(output: Path, end: str) -> Path:
    """Another name in the directory in which `output` really lies, wherever links lead."""
    place = Path(os.path.realpath(output))
    return place.with_name(f"{place.name}.{end}")


@contextlib.contextmanager
def alone(partial: Path) -> Iterator[Path]:
    """A directory, made if it is not there, for this process: no other one gets it meanwhile. A lock that ends with
    the process keeps it, so that one left by a process that was killed is free. Raises OSError."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        _lock(handle)
        if not partial.is_dir() or not os.path.samestat(os.stat(partial), os.fstat(handle)):
            raise _busy()  # it has been finished in between
        yield partial
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            raise _busy() from error
        # else a file system that knows no locks: one goes on without, as ever


def _busy() -> OSError:
    return OSError(errno.EBUSY, "another process is writing it; wait for that one, or choose another directory")


def clear(directory: Path, kept: Collection[Path] = ()) -> None:
    """Removes what it holds, but for `kept`."""
    for path in set(directory.iterdir()) - set(kept):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def put(partial: Path, output: Path) -> None:
    """Renames `partial` to `output`. The older one, if there is any, is gone afterwards, and in its place if that
    fails."""
    place, replaced = Path(os.path.realpath(output)), beside(output, "replaced")
    recover(output)
    if place.exists():
        os.replace(place, replaced)
    try:
        os.replace(partial, place)
    except BaseException:
        recover(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def recover(output: Path) -> None:
    """Brings back what `put` had moved away when its process was killed, or removes what was left of that."""
    place, replaced = Path(os.path.realpath(output)), beside(output, "replaced")
    if not replaced.exists():
        return
    if place.exists():
        shutil.rmtree(replaced)
    else:
        os.replace(replaced, place)
