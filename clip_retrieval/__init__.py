"""Finetune and evaluate CLIP models for image-text retrieval."""

import os

__version__ = "0.9.0"

# Threads that wait for each other sleep instead of spinning: on a CPU that other programs use too, spinning makes a
# training step more than ten times slower. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
