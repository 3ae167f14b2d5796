"""The README's commands are commands."""

import re
import shlex

import pytest

from clip_retrieval.command_line import parse
from clip_retrieval.run.settings import settle
from tests.conftest import ROOT

COMMANDS = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python main.py")])
def test_main_py_takes_it(command):
    arguments = shlex.split(command, comments=True)[2:]
    settle(parse(arguments))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "scripts/" in c])
def test_the_script_is_there(command):
    script = re.search(r"scripts/\S+", command)[0]
    assert (ROOT / script).is_file()


def test_every_option_in_the_readme_exists():
    from clip_retrieval.command_line import build_parser

    known = set(build_parser("")._option_string_actions) | {"--nproc_per_node"}
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z_]+)"', script.read_text()))
    named = set(re.findall(r"--[a-z][a-z_0-9]+", (ROOT / "README.md").read_text()))
    assert named <= known, named - known
    assert len(named) > 20


def test_every_recipe_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    inner = {"setup.sh"}
    for script in (ROOT / "scripts").glob("*.sh"):
        assert script.name in inner or script.name in text, script.name
