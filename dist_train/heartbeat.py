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

    def beat(self, step: int) -> None:
        """After each call of the loop; a launcher that has gone is no reason to fail."""
        if self._path is None:
            return
        try:
            self._path.write_text(str(step))
        except OSError:
            self._path = None
