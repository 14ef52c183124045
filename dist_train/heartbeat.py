"""Heartbeat: tells whoever started this process that it is alive, and how far it is."""

from collections.abc import Mapping
from pathlib import Path


class Heartbeat:
    """Rewrites the file that DIST_LAUNCH_HEARTBEAT names with the number of steps done.

    Args:
      environ: without the variable, nothing is written.
    """

    def __init__(self, environ: Mapping[str, str]):
        name = environ.get("DIST_LAUNCH_HEARTBEAT")
        self._path = Path(name) if name else None
        self._step = 0

    def beat(self, step: int | None = None) -> None:
        """After each call of the loop, and without a step during an evaluation.

        A launcher that has gone is no reason to fail.
        """
        if step is not None:
            self._step = step
        if self._path is None:
            return
        try:
            self._path.write_text(str(self._step))
        except OSError:
            self._path = None
