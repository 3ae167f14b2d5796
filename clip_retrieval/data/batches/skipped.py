"""What training batches pass over: samples that cannot be used, and the ends of captions that are too long."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clip_retrieval.distributed import Processes
from clip_retrieval.log import log


class SkipCounter:
    """Counts what an epoch passes over, and says it at the epoch's end, or where it is broken off.

    Args:
        what: what could not be used, e.g. "samples".
        processes: those that share the batches.
        context_length: in tokens, for captions that are cut.
    """

    def __init__(self, what: str, processes: Processes, context_length: int | None = None):
        self.what = what
        self.processes = processes
        self.context_length = context_length
        self._said_cut = False
        self.begin(0, 0)

    def begin(self, epoch: int, batch: int) -> None:
        """Count anew, from this batch of an epoch on."""
        self._epoch, self._first_batch, self._batches = epoch, batch, batch
        self._problems, self._cut, self._said, self._first = 0, 0, 0, ""

    def count(self, problems: Sequence[str], cut: int = 0) -> None:
        """Note the problems of this process's part of the next batch, and the captions that were cut in it."""
        self._batches += 1
        self._problems += len(problems)
        self._cut += cut
        self._first = self._first or "".join(problems[:1])

    def log_all(self) -> None:
        """Say what all processes passed over: they must all be here."""
        problems, cut = self.processes.sum(torch.tensor([self._problems, self._cut])).tolist()
        if problems:  # the one that speaks need not be the one that met them
            own = f"{self._first}\n".encode(errors="backslashreplace") if self._first else b""
            texts = self.processes.all_gather_rows(torch.tensor(list(own), dtype=torch.uint8))
            self._first = bytes(texts.tolist()).decode().partition("\n")[0]
        self._say(problems, cut)

    def log_own(self) -> None:
        """Say what this process passed over, if that was not said: the others need not be here."""
        if self._problems > self._said or (self._cut and not self._said_cut):
            self._say(self._problems, self._cut, " of this process's" * (self.processes.world_size > 1))

    def _say(self, problems: int, cut: int, of: str = "") -> None:
        where = f"epoch {self._epoch + 1}, batches {self._first_batch + 1:,} to {self._batches:,}"
        if problems:
            first = f": {self._first}" if self._first else ""
            log.warning(f"{where}: {problems:,}{of} {self.what} could not be used, others stood in for them{first}")
            self._said = self._problems
        if cut and not self._said_cut:  # of other captions in other epochs about as many
            log.info(f"{where}: {cut:,}{of} captions cut to {self.context_length} tokens")
            self._said_cut = True
