"""The option values of each run of a sweep: all combinations, or random draws."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import random
import re
from collections.abc import Sequence

from clip_retrieval.command_line import OptionParser, build_parser
from clip_retrieval.errors import UserError

RANGES = ("log", "uniform", "int")
MOST_RUNS = 10_000
LONGEST_NAME = 150  # characters of a run's name
DRAWS = 100  # draws for each new combination, before all are taken to be found
SET_BY_SWEEP = ("experiments", "checkpoint_path", "resume", "overwrite", "eval")
SAME_IN_ALL = (*SET_BY_SWEEP, "config", "preset")

Values = dict[str, str]


def read_values(words: Sequence[str], parser: OptionParser | None = None) -> dict[str, list[str]]:
    """Read `lr=1e-5,3e-5` words into the values of each option, by its first spelling.

    Raises UserError for an unknown option, a duplicate, or one without values.
    """
    parser = parser or build_parser("", prog="main.py")
    listed: dict[str, list[str]] = {}
    for word in words:
        typed, _, text = word.partition("=")
        action = parser.action("--" + typed.replace("-", "_"))
        if action is None or (isinstance(action, argparse._StoreConstAction) and not _is_switch(action)):
            raise UserError(f"--values {word}: main.py has no option --{typed}{parser.suggest('--' + typed)}")
        name, values = action.dest, [value.strip() for value in text.split(",")]
        if name in SAME_IN_ALL:
            raise UserError(f"--values {word}: {name} cannot differ between the runs of a sweep; drop it")
        if name in listed or len(set(values)) < len(values):
            raise UserError(f"--values {word}: a duplicate; give each option once, with different values")
        if "" in values:
            raise UserError(f"--values {word}: an empty value; write OPTION=VALUE,VALUE")
        if _is_switch(action) and not set(values) <= {"true", "false"}:
            raise UserError(f"--values {word}: {name} is a switch; its values are true and false")
        listed[name] = values
    return listed


def combine(listed: dict[str, list[str]]) -> list[Values]:
    """Return all combinations; the last option varies fastest. Raises UserError for a range, or for too many."""
    for name, values in listed.items():
        if found := [value for value in values if _is_range(value)]:
            raise UserError(f"--values {name}={found[0]}: a range is for --random N; list values, or add --random")
    if math.prod(map(len, listed.values())) > MOST_RUNS:
        raise UserError(f"--values make more than {MOST_RUNS:,} runs; list fewer values, or add --random N")
    return [dict(zip(listed, values)) for values in itertools.product(*listed.values())]


def read_changes(words: Sequence[str], parser: OptionParser | None = None) -> list[Values]:
    """Read the words of --ablate, such as `ema=0.99` or `trainable=lora lr=1e-3`, each into the options it changes.

    Raises UserError as `read_values` does, and for more than one value of an option.
    """
    parser, changes = parser or build_parser("", prog="main.py"), []
    for word in words:
        listed = read_values(re.split(r"\s+(?=[\w-]+=)", word.strip()), parser)
        if several := [name for name, values in listed.items() if len(values) > 1 or _is_range(values[0])]:
            raise UserError(f"--ablate {word}: {several[0]} needs one value; give each change in quotes of its own")
        changes.append({name: values[0] for name, values in listed.items()})
    return changes


def ablate(runs: Sequence[Values], changes: Sequence[Values]) -> list[Values]:
    """Return each run as it is, and with each of the changes alone; a change takes precedence over the run's values."""
    return [values | change for values in runs for change in ({}, *changes)]


def draw(listed: dict[str, list[str]], number: int, seed: int) -> list[Values]:
    """Draw `number` different combinations, or fewer if there are no more.

    `log:1e-6:1e-4`, `uniform:0:0.3` and `int:4:64` are ranges, with both ends. The first draws do not depend on
    `number` (Bergstra and Bengio 2012, Random search for hyper-parameter optimization).
    """
    generator, drawn = random.Random(seed), dict[tuple[str, ...], Values]()
    for _ in range(DRAWS * number):
        values = {name: _draw_one(name, generator.choice(each), generator) for name, each in listed.items()}
        drawn.setdefault(tuple(values.values()), values)
        if len(drawn) == number:
            break
    return list(drawn.values())


def _is_range(value: str) -> bool:
    return value.count(":") == 2 and value.split(":")[0] in RANGES


def _draw_one(name: str, value: str, generator: random.Random) -> str:
    """Return a value as it is, or a number from a range, with three digits."""
    if not _is_range(value):
        return value
    kind, *ends = value.split(":")
    try:
        low, high = (int(end) if kind == "int" else float(end) for end in ends)
    except ValueError:
        low, high = 1, 0
    if not -math.inf < low <= high < math.inf or (kind == "log" and low <= 0):
        raise UserError(f"--values {name}={value}: not a range; write log:LOW:HIGH, uniform:LOW:HIGH or int:LOW:HIGH")
    if kind == "int":
        return str(generator.randint(int(low), int(high)))
    position = generator.random()
    number = low * (high / low) ** position if kind == "log" else low + position * (high - low)
    return f"{min(max(number, low), high):.3g}"


def _is_switch(action: argparse.Action) -> bool:
    return isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction))


def to_arguments(values: Values, parser: OptionParser | None = None) -> list[str]:
    """Return the values as arguments of main.py; one with blanks is a list."""
    parser, arguments = parser or build_parser("", prog="main.py"), list[str]()
    for name, value in values.items():
        action = parser.action(f"--{name}")
        if action is not None and _is_switch(action):
            inverse = name[3:] if name.startswith("no_") else f"no_{name}"
            arguments.append(f"--{name if value == 'true' else inverse}")
        elif action is not None and action.nargs == "+":
            arguments += [f"--{name}", *value.split()]
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def name_run(values: Values) -> str:
    """Return `lr=1e-5_batch_size=128`; a hash of the values distinguishes names that were changed or cut."""
    exact = "_".join(f"{name}={value}" for name, value in values.items()) or "plain"
    name = re.sub(r"[^A-Za-z0-9.=@_+-]+", "-", exact)[:LONGEST_NAME]
    return name if name == exact else f"{name}_{hashlib.sha256(exact.encode(errors='replace')).hexdigest()[:8]}"
