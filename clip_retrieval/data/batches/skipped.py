"""Count the skipped samples and cut captions of training batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clip_retrieval.distributed import Processes
from clip_retrieval.log import log


class SkipCounter:
    """Counts the skipped samples and cut captions of an epoch; logs them at its end or interruption.

    Args:
        noun: the skipped things, e.g. "samples".
        processes: the processes that share the batches.
        context_length: the tokens to which captions are cut.
    """

    def __init__(self, noun: str, processes: Processes, context_length: int | None = None):
        self.noun = noun
        self.processes = processes
        self.context_length = context_length
        self._is_cut_logged = False
        self.begin(0, 0)

    def begin(self, epoch: int, batch: int) -> None:
        """Reset the counts; start at this batch of an epoch."""
        self._epoch, self._first_batch, self._batches = epoch, batch, batch
        self._problems, self._cut, self._logged, self._first = 0, 0, 0, ""

    def count(self, problems: Sequence[str], cut: int = 0) -> None:
        """Add the problems and the number of cut captions of this process's part of the next batch."""
        self._batches += 1
        self._problems += len(problems)
        self._cut += cut
        self._first = self._first or "".join(problems[:1])

    def log_all(self) -> None:
        """Log the counts of all processes. A collective: every process must call it."""
        problems, cut = self.processes.sum(torch.tensor([self._problems, self._cut])).tolist()
        if problems:  # the first problem may be another process's
            own = f"{self._first}\n".encode(errors="backslashreplace") if self._first else b""
            texts = self.processes.all_gather_rows(torch.tensor(list(own), dtype=torch.uint8))
            self._first = bytes(texts.tolist()).decode().partition("\n")[0]
        self._log(problems, cut)

    def log_own(self) -> None:
        """Log the counts of this process, unless they were logged. Needs no other process."""
        if self._problems > self._logged or (self._cut and not self._is_cut_logged):
            self._log(self._problems, self._cut, " of this process's" * (self.processes.world_size > 1))

    def _log(self, problems: int, cut: int, of: str = "") -> None:
        first, last = self._first_batch + 1, self._batches
        numbers = f"batch {last:,}" if first == last else f"batches {first:,} to {last:,}"
        batches = f"epoch {self._epoch + 1}, {numbers}"
        if problems:
            example = f": {self._first}" if self._first else ""
            noun = self.noun.removesuffix("s") if problems == 1 and not of else self.noun
            log.warning(f"{batches}: {problems:,}{of} {noun} could not be used, replaced by others{example}")
            self._logged = self._problems
        if cut and not self._is_cut_logged:  # once: other epochs cut about as many
            noun = "caption" if cut == 1 and not of else "captions"
            log.info(f"{batches}: {cut:,}{of} {noun} cut to {self.context_length} tokens")
            self._is_cut_logged = True
