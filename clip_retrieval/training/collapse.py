"""Detect a run whose features have all become equal."""

from __future__ import annotations

import math

LINES = 5  # consecutive log lines
TOLERANCE = 1e-3


class CollapseWatch:
    """Detects an InfoNCE loss that stays at ln(batch_size), its value if all features are equal.

    A random model starts there too, but leaves it within the first log lines.

    Attributes:
        chance: ln(batch_size).
    """

    def __init__(self, batch_size: int):
        self.chance = math.log(batch_size)
        self._lines = 0

    def has_collapsed(self, loss: float) -> bool:
        """Whether this loss is the LINES-th in a row at chance. True only once."""
        self._lines = self._lines + 1 if abs(loss - self.chance) < TOLERANCE else 0
        return self._lines == LINES
