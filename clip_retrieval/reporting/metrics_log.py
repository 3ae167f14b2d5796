"""The metrics of a run by step: metrics.jsonl and trackers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_retrieval.errors import format_count
from clip_retrieval.files import named_errors, open_append, open_regular, remove_special, write_text
from clip_retrieval.log import log
from clip_retrieval.reporting.trackers import open_tracker


class MetricsLog:
    """Metrics by step: one line each in metrics.jsonl, and the scalars of trackers, such as TensorBoard.

    Args:
        folder: the run's folder.
        keep: for a resumed run, the last step to keep of each kind. Later lines are deleted, because the run writes
            them again. Damaged lines are deleted too.
        trackers: names of trackers, of TRACKERS.
        options: all options, which the trackers show.

    Every method raises OSError, naming the file, if writing fails.
    """

    def __init__(
        self,
        folder: Path,
        keep: Mapping[str, int] | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        options: Mapping[str, Any] | None = None,
    ):
        self._path = folder / "metrics.jsonl"
        remove_special(self._path)
        write_text(self._path, "".join(self._lines_to_keep(keep or {})))
        self._file = open_append(self._path)
        first_step = max(keep.values()) + 1 if keep else None
        self._trackers = [open_tracker(name, folder, options or {}, first_step) for name in trackers]

    def _lines_to_keep(self, keep: Mapping[str, int]) -> Iterator[str]:
        if not keep or not self._path.is_file():
            return
        damaged = 0
        with open_regular(self._path) as file:
            for line in file:
                try:
                    content = json.loads(line)
                    keeps = content["step"] <= keep.get(content["kind"], -1)
                # Not JSON, not UTF-8, not a dict, or without the keys. A killed run leaves half a line at the end.
                except (ValueError, TypeError, LookupError, RecursionError):
                    damaged += line.endswith(b"\n")
                    continue
                if keeps:
                    yield json.dumps(content) + "\n"
        if damaged:
            log.warning(f"{self._path}: skipped {format_count(damaged, 'damaged line')}")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write `values` (numbers, or dicts of numbers) of `kind` ("train", "val", ...) at `step`."""
        with named_errors(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        scalars = dict(_flatten(values, kind))
        for tracker in self._trackers:
            tracker.write(scalars, step)

    def close(self) -> None:
        with named_errors(self._path):
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _flatten(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{name}", value
