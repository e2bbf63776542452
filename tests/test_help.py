"""--help of every command: each flag says what it is for, and what it is unless given."""

from __future__ import annotations

import argparse
import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
COMMANDS = tomllib.loads(PROJECT.read_text())["project"]["scripts"]
MODES = {"fp8-inspect": [["compare"], ["graph"]]}


class Parsing(Exception):
    """Instead of parsing."""


def parsers(command: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.ArgumentParser]:
    """Those that a command makes, of its modes too."""

    def stop(self: argparse.ArgumentParser, *_: object) -> None:
        found.append(self)
        raise Parsing

    module, main = COMMANDS[command].split(":")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for arguments in [[], *MODES.get(command, [])]:
        found: list[argparse.ArgumentParser] = []
        with pytest.raises(Parsing):
            getattr(importlib.import_module(module), main)(arguments)
        yield from found
        for action in found[0]._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "fp8-lm-eval"])  # lm-eval's own
def test_every_flag_says_what_it_is_for_and_its_default(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for parser in parsers(command, monkeypatch):
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
                continue
            flag = f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
            assert action.help, f"{flag} has no help"
            number = isinstance(action.default, int | float) and not isinstance(action.default, bool)
            if action.option_strings and number:
                told = "default" in action.help or f"(default: {action.default})" in text
                assert told, f"{flag} hides its default"


def test_examples_in_help_keep_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("fp8-quantize", "fp8-build", "fp8-eval"):
        (parser,) = parsers(command, monkeypatch)
        assert f"\n  {command} " in parser.format_help()


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_before_a_command_is_imported_is_no_traceback(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, name = COMMANDS[command].split(":")
    main = getattr(importlib.import_module(module), name)
    assert callable(importlib.import_module(f"fp8.scripts.{name}").main)
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}"])
    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", interrupt)
        assert main() == 130
    assert capsys.readouterr().err == f"{command}: interrupted\n"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
