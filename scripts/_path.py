"""`import _path` in a script: it finds clip_retrieval from a bare clone, whatever the working directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
