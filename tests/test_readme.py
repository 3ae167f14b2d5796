"""The README's commands are commands."""

import re
import shlex

import pytest

from clip_retrieval.options import Options, parse
from tests.conftest import ROOT

COMMANDS = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python main.py")])
def test_main_py_takes_it(command):
    arguments = shlex.split(command, comments=True)[2:]
    Options.settle(parse(arguments))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "scripts/" in c])
def test_the_script_is_there(command):
    script = re.search(r"scripts/\S+", command)[0]
    assert (ROOT / script).is_file()


def test_every_option_in_the_readme_exists():
    from clip_retrieval.options import build_parser

    known = set(build_parser("")._option_string_actions)
    tools = {"--image_features", "--text_features", "--text_to_image", "--results", "--nproc_per_node"}
    tools |= {
        "--data_dir",
        "--splits",
        "--output",
        "--image_feats",
        "--text_feats",
        "--image_data",
        "--text_data",
        "--top_k",
    }
    named = set(re.findall(r"--[a-z][a-z_0-9]+", (ROOT / "README.md").read_text()))
    assert named <= known | tools, named - known - tools
    assert len(named) > 20


def test_every_recipe_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    inner = {"setup.sh"}
    for script in (ROOT / "scripts").glob("*.sh"):
        assert script.name in inner or script.name in text, script.name
