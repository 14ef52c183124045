"""Outcome: what a finished run leaves behind for others: exports, pictures, the report."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from dist_train import (
    checkpoint,
    curves,
    export,
    pictures,
    replicas,
    report,
    review,
    versions,
)
from dist_train.build import Parts
from dist_train.config import Config
from dist_train.log import RunLog
from dist_train.rows import Row, read_rows
from dist_train.settings import differences
from dist_train.task import Task
from dist_train.workdir import Workdir
from dist_train.workers import Workers


class Outcome:
    """The outcome of one run; the chief alone makes it, without a collective.

    Args:
      task: whose test examples, or else those of validation, are looked through for mistakes.
      parts: of the run.
      config: its settings.
      workers: who trained.
      workdir: where it lies.
    """

    def __init__(
        self,
        task: Task,
        parts: Parts,
        config: Config,
        workers: Workers,
        workdir: Workdir,
    ):
        self._parts = parts
        self._config = config
        self._workers = workers
        self._workdir = workdir
        named = {"test": task.test, "validation": task.validation}
        self._held_out = {kind: source for kind, source in named.items() if source is not None}
        self._begun = time.monotonic()

    def write(
        self,
        step: int,
        results: Mapping[str, Mapping[str, float]],
        log: RunLog,
        beat: Callable[[], None],
    ) -> None:
        """Writes model.keras, saved_model/, curves.png and report.html.

        Args:
          step: the last one that was done.
          results: the last means of each kind.
          log: gets the pictures too.
          beat: called now and then.
        """
        model, workdir = self._parts.model, self._workdir
        with self._parts.averaged_weights():
            export.write(model, workdir.model, workdir.saved_model)
            shown = self._shown(beat)
        rows = read_rows(workdir.metrics)
        curves.draw(rows, self._parts.program.mean_names, workdir.curves)
        for tag, picture in shown.items():
            log.picture(tag, picture.png, step)
        drawn = report.Picture("Curves", "by step", workdir.curves.read_bytes())
        report.write(
            report.Report(
                title=f"{self._config.task}: {workdir.name}",
                metrics=results,
                summary=self._summary(step, rows),
                pictures=[drawn, *shown.values()],
                settings=differences(_settings(self._config), _settings(Config())),
                environment=self._environment(),
            ),
            workdir.report,
        )

    def tell(self) -> None:
        """Copies all to where the workdir really is, and says where everything lies."""
        self._workdir.push()
        step = self._parts.best.step
        best = "" if step is None else f" (the best is {checkpoint.name_of(step, checkpoint.BEST)})"
        logging.info(
            "done in %.1f s: %s holds report.html, model.keras, saved_model/, curves.png,"
            " metrics.jsonl, checkpoints/%s, tensorboard/",
            self._seconds,
            self._workdir.name,
            best,
        )

    @property
    def _seconds(self) -> float:
        """Since this was made, which is when the run began."""
        return time.monotonic() - self._begun

    def _shown(self, beat: Callable[[], None]) -> dict[str, report.Picture]:
        """{tag: picture} of the mistakes, if the task is to classify."""
        if not self._held_out:
            return {}
        kind, source = next(iter(self._held_out.items()))
        share = -(-self._config.batch_size // self._workers.replicas)
        found = review.examine(
            source,
            self._parts.program,
            batch_size=share,
            seconds=self._config.stall_timeout_s / 3,  # the other workers wait
            beat=beat,
        )
        if found is None:
            return {}
        right = int(np.trace(found.confusion))
        seen = f"{found.examples:,}" + ("" if found.examples == found.of else f" of {found.of:,}")
        shown = {
            f"{kind}/confusion": report.Picture(
                "Confusion matrix",
                f"{seen} {kind} examples, {right:,} of them right; a row for each label, a column"
                " for each prediction",
                pictures.confusion(found.confusion),
            )
        }
        if found.pictures:
            captions = [
                f"{m.index}: {m.label} as {m.guess}, {m.probability:.0%}" for m in found.mistakes
            ]
            shown[f"{kind}/worst_mistakes"] = report.Picture(
                "Worst mistakes",
                f"the {len(captions)} greatest losses of wrong predictions; index: label as"
                " prediction, and its probability",
                pictures.grid(found.pictures, captions),
            )
        return shown

    def _summary(self, step: int, rows: list[Row]) -> dict[str, str]:
        parts = self._parts
        schedule = parts.inputs["train"].schedule
        rates = [row["examples_per_second"] for row in rows if row.get("examples_per_second")]
        summary = {
            "steps": f"{step:,} of {parts.total_steps:,}, {schedule.steps_per_epoch:,} per epoch",
            "time": f"{self._seconds:.1f} s since this start",
        }
        if rates:
            summary["speed"] = f"{statistics.median(rates):,.0f} examples/s while training (median)"
        if (best := parts.best.step) is not None:
            summary["best checkpoint"] = (
                f"{self._workdir.checkpoints}/{checkpoint.name_of(best, checkpoint.BEST)}"
                f" (validation {self._config.best_metric} {parts.best.value:.4f})"
            )
        return summary | {"model": f"{self._workdir.model.name}, {self._workdir.saved_model.name}/"}

    def _environment(self) -> dict[str, str]:
        workers = self._workers
        return {
            **versions.installed(),
            "strategy": f"{self._config.strategy}, {workers.count} worker(s), "
            f"{workers.replicas} replica(s)",
            "devices of the chief": replicas.describe(workers.local_replicas),
        }


def _settings(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)
