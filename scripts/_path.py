"""`import _path` lets a script import clip_retrieval from a bare clone, in any working directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
