"""An installed package has all modules, and the model configs, split lists and templates of the project."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

SUFFIXES = (".py", ".csv", ".json", ".yaml", ".html", ".css", ".js", ".svg", ".mplstyle")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder that an installation copies."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build")
    command = ["setup.py", "-q", "egg_info", "--egg-base", folder, "build", "--build-base", folder]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def test_all_modules_and_data_files_are_installed(built):
    package = ROOT / "clip_retrieval"
    expected = {path.relative_to(package) for path in package.rglob("*") if path.suffix in SUFFIXES}
    found = {path.relative_to(built / "clip_retrieval") for path in built.rglob("*.*")}
    lists = {path.name for path in (ROOT / "datasets" / "annotations").iterdir() if path.suffix in (".npy", ".txt")}
    assert expected <= found and len(lists) == 10
    assert {path.name for path in found if path.parts[:2] == ("data", "annotations")} == lists


def test_installed_package_finds_its_data_files(built):
    code = (
        "from clip_retrieval.data.readers.annotations import ANNOTATIONS, read_ids\n"
        "from clip_retrieval.models.names import our_configs\n"
        "print(ANNOTATIONS, len(read_ids(ANNOTATIONS / 'coco_test_ids.npy')), 'small' in our_configs())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=built, capture_output=True, text=True)
    assert done.stdout == f"{built / 'clip_retrieval/data/annotations'} 25000 True\n", done.stderr
