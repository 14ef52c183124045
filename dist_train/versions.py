"""Versions: of Python, of the packages whose numbers matter, and of the source itself."""

import contextlib
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path


def installed() -> dict[str, str]:
    """{"python": "3.11.7", "tensorflow": …}, without importing any of them."""
    found = {}
    for name in ("dist_train", "tensorflow", "keras", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"python": platform.python_version()}


def source_digest(extra: Iterable[Path] = ()) -> str:
    """A digest of this package's code and of further files."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.rglob("*.py")), *extra]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
