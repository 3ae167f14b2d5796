"""The options of main.py are a contract: their names, spellings, kinds and defaults change only on purpose."""

import argparse
from pathlib import Path

from clip_retrieval.command_line import build_parser
from clip_retrieval.options import Options

FROZEN = Path(__file__).with_name("options.txt")


def describe(action: argparse.Action, defaults: dict) -> str:
    """One line for an option: its spellings, what it takes, and its default."""
    takes = {0: "flag", None: "value"}.get(action.nargs, "values")
    const = f" = {action.const}" if action.nargs == 0 else ""
    return f"{' '.join(action.option_strings)} | {action.dest} | {takes}{const} | {defaults.get(action.dest)!r}"


def test_options_are_those_of_the_contract():
    defaults = Options().flat()
    found = [describe(action, defaults) for action in build_parser("")._actions]
    assert found == FROZEN.read_text().splitlines()
