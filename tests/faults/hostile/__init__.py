"""Hostile and extreme files, each with the command that reads it and what has to come of it."""

from __future__ import annotations

from tests.faults.hostile.case import Case
from tests.faults.hostile.checkpoints import CHECKPOINTS
from tests.faults.hostile.images import IMAGES
from tests.faults.hostile.models import MODELS
from tests.faults.hostile.packed import PACKED
from tests.faults.hostile.places import PLACES
from tests.faults.hostile.texts import TEXTS
from tests.faults.hostile.weights import WEIGHTS

CASES: dict[str, Case] = {
    case.name: case for case in (*TEXTS, *IMAGES, *PACKED, *WEIGHTS, *MODELS, *CHECKPOINTS, *PLACES)
}
