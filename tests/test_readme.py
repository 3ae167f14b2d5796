"""The commands, options and links in the Markdown files are valid."""

import re
import shlex

import pytest

from clip_retrieval.command_line import build_parser, parse
from clip_retrieval.run.merge import settle
from tests.conftest import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
COMMANDS = list(
    dict.fromkeys(
        line
        for text in PAGES.values()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    )
)


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "main.py" in c])
def test_main_py_accepts_the_command(command):
    words = shlex.split(command, comments=True)
    settle(parse(words[words.index("main.py") + 1 :]))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "scripts/" in c])
def test_the_script_exists(command):
    script = re.search(r"scripts/\S+", command)[0]
    assert (ROOT / script).is_file()


def test_the_readme_has_commands():
    assert len(COMMANDS) > 30


def test_every_option_exists():
    known = set(build_parser("")._option_string_actions) | {"--nproc_per_node"}
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z_]+)"', script.read_text()))
    for page in (
        "README.md",
        "docs/data.md",
        "docs/training.md",
        "docs/evaluation.md",
        "docs/benchmarks.md",
        "docs/export.md",
        "docs/python.md",
        "docs/systems.md",
        "docs/results.md",
        "docs/recipes.md",
        "docs/search.md",
    ):
        named = set(re.findall(r"--[a-z][a-z_0-9]+", PAGES[page]))
        assert named <= known, (page, named - known)
    assert len(set(re.findall(r"--[a-z][a-z_0-9]+", PAGES["README.md"]))) > 20


def test_every_recipe_is_in_the_readme():
    inner = {"setup.sh"}
    for script in (ROOT / "scripts").glob("*.sh"):
        assert script.name in inner or script.name in PAGES["README.md"], script.name


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "](#" in text])
def test_every_section_is_in_the_table_of_contents(page):
    listed = set(re.findall(r"^- \[.*\]\(#(.*)\)$", PAGES[page], re.MULTILINE))
    sections = set(re.findall(r"^## (.*)$", PAGES[page], re.MULTILINE)) - {"Contents"}
    assert listed == {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in sections}
