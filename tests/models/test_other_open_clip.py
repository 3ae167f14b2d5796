"""The towers with another version of open_clip: CLIP_RETRIEVAL_OPEN_CLIP is the `src` folder of its sources."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = os.environ.get("CLIP_RETRIEVAL_OPEN_CLIP")


@pytest.mark.slow
@pytest.mark.skipif(SOURCES is None, reason="CLIP_RETRIEVAL_OPEN_CLIP does not name the sources of another open_clip")
def test_towers_equal_those_of_another_open_clip():
    tests = [f"tests/models/test_{name}.py" for name in ("fast_layers", "pooled", "drop_path")]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", "not slow", *tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(SOURCES)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
