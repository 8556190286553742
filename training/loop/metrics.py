"""Reports of a stage's numbers: the log or a progress bar, metrics.jsonl, and TensorBoard.

On a terminal there is one bar per stage with the time left; elsewhere every report is one line of
`name=value;` pairs (`dalle.platform.metric_lines` has the regular expressions for them). Knows
names and numbers, and nothing of what they measure.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from dalle.errors import PlatformError
from dalle.platform.disk import disk_errors, write_atomically
from dalle.platform.metric_lines import render_metrics


class Metrics:
    """Reports of one job.

    Each is one JSON object a line: {"stage", "step", "seconds", <metric>: number or null, …}.
    Close it (or use `with`) so that TensorBoard's file is complete. Everything raises
    DiskFullError, or PlatformError for other trouble with the disk.
    """

    def __init__(self, jsonl: Path, tensorboard: Path, *, output: TextIO | None = None) -> None:
        self._jsonl = jsonl
        self._tensorboard = tensorboard
        self._output = sys.stdout if output is None else output
        self._records: list[dict[str, Any]] = []
        with self._disk_errors(tensorboard):
            self._writer = SummaryWriter(str(tensorboard))
        self._rewrite()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except PlatformError:
            if kind is None:  # what failed first is the cause
                raise

    def close(self) -> None:
        with self._disk_errors(self._tensorboard):
            self._writer.close()

    def report(
        self,
        stage: str,
        step: int,
        seconds: float,
        values: Mapping[str, float],
        *,
        seconds_left: float | None = None,
    ) -> None:
        """Report metric names -> values; the printed names begin with the stage's.

        seconds: spent on this stage so far. seconds_left: an estimate, which is printed only.
        """
        record = {"stage": stage, "step": step, "seconds": round(seconds, 3)} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        self._records.append(record)
        with self._disk_errors(self._jsonl), self._jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        with self._disk_errors(self._tensorboard):
            for name, value in values.items():
                self._writer.add_scalar(f"{stage}/{name}", value, step)
        if not self._output.isatty():
            printed = {f"{stage}_step": step} | {f"{stage}_{n}": v for n, v in values.items()}
            if seconds_left is not None:
                printed[f"{stage}_seconds_left"] = round(seconds_left)
            print(render_metrics(printed), file=self._output, flush=True)

    def records(self, stage: str) -> list[dict[str, Any]]:
        """Return the reports of one stage, oldest first; its checkpoints hold them."""
        return [dict(record) for record in self._records if record["stage"] == stage]

    def restore(self, stage: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace a stage's records by a checkpoint's, so that no step is reported twice.

        The output directory does not survive an interruption; the checkpoints do.
        """
        others = [record for record in self._records if record["stage"] != stage]
        self._records = others + [dict(record) for record in records]
        self._rewrite()
        with self._disk_errors(self._tensorboard):
            for record in records:
                for name, value in record.items():
                    if isinstance(value, int | float) and name not in ("step", "seconds"):
                        self._writer.add_scalar(f"{stage}/{name}", value, record["step"])

    def _rewrite(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self._records)
        with self._disk_errors(self._jsonl):
            write_atomically(self._jsonl, lines)

    @staticmethod
    def _disk_errors(path: Path) -> AbstractContextManager[None]:
        """Raise our errors for OSError; TensorBoard's thread raises its errors in a later call."""
        return disk_errors(
            f"write the metrics {path}",
            if_full="the checkpoints are kept. Give the job a larger volume, or report less often "
            "(log_every)",
            directory=path,
        )


class Progress:
    """Progress bar with the time left when the output is a terminal; nothing otherwise.

    total: the budget, in steps or seconds as `unit` says. is_shown: False for no bar at all.
    """

    def __init__(
        self,
        stage: str,
        *,
        total: float,
        done: float,
        unit: str,
        is_shown: bool = True,
        output: TextIO | None = None,
    ) -> None:
        self._bar = tqdm(
            total=math.ceil(total),
            initial=min(math.floor(done), math.ceil(total)),
            desc=stage,
            unit=unit,
            file=output,
            disable=None if is_shown else True,  # None: where the output is no terminal
            dynamic_ncols=True,
        )
        self._total = math.ceil(total)

    @property
    def is_on_terminal(self) -> bool:
        """Whether there is a bar to be seen."""
        return not self._bar.disable

    def show(self, done: float, values: Mapping[str, float] | None = None) -> None:
        """Move the bar to `done` of the total and show the latest values."""
        if values:
            self._bar.set_postfix({n: f"{v:.4g}" for n, v in values.items()}, refresh=False)
        self._bar.update(min(math.floor(done), self._total) - self._bar.n)

    def close(self) -> None:
        self._bar.close()
