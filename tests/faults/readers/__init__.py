"""The readers of the package, each with valid documents to damage and a function that reads them."""

from __future__ import annotations

from tests.faults.readers.data import DATA
from tests.faults.readers.images import IMAGES
from tests.faults.readers.models import MODELS
from tests.faults.readers.packed import PACKED
from tests.faults.readers.reader import Reader
from tests.faults.readers.results import RESULTS

READERS: dict[str, Reader] = {reader.name: reader for reader in (*DATA, *PACKED, *IMAGES, *MODELS, *RESULTS)}
