"""A run whose features have become all the same is noticed."""

from __future__ import annotations

import math

LINES = 5  # log lines in a row
TOLERANCE = 1e-3


class CollapseWatch:
    """Notices an InfoNCE loss that stays at ln(batch_size), its value if all features are equal.

    A fresh random model begins there too, and leaves it within the first log lines.
    """

    def __init__(self, batch_size: int):
        self._chance = math.log(batch_size)
        self._lines = 0

    def has_collapsed(self, loss: float) -> bool:
        """Whether the loss of this log line is the LINES-th in a row at chance: True once."""
        self._lines = self._lines + 1 if abs(loss - self._chance) < TOLERANCE else 0
        return self._lines == LINES
