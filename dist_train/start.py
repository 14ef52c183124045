"""Start: from the settings to a running group of workers that agree, and then the loop.

Everything that can go wrong before TensorFlow is imported is found before it is: an import takes
seconds, and after it a missing peer means a wait that no signal ends.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import cluster as clusters
from dist_train import rendezvous, stopping, task, watchdog
from dist_train.config import Config
from dist_train.workdir import Workdir

if TYPE_CHECKING:
    from dist_train.loop import Result

# What may differ between the workers of one run: paths and habits of a machine.
_PER_WORKER = {
    "workdir", "data_dir", "input", "steps_per_loop", "progress", "initial_weights",
    "start_timeout_s", "stall_timeout_s",
}  # fmt: skip


def train(
    task: "task.Task | Callable[..., task.Task] | None" = None, config: Config | None = None
) -> "Result":
    """Trains (or evaluates) a task; what `dist-train` does.

    Args:
      task: a Task or a function that returns one and may take the Config; None: the one that
        config.task names.
      config: the settings; None: all defaults.

    Returns:
      The metrics, the model, the number of steps and the workdir.

    Raises:
      UsageError: settings, environment, task or data cannot be used.
      RunError: the run failed; the last checkpoint is intact.
      Stopped: a signal asked to stop; the state was saved.
    """
    config = config or Config()
    cluster = clusters.of_environment(os.environ, config.strategy)
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(stopping.listening())
        workdir = None
        if cluster is None or cluster.is_chief:
            create = config.mode == "train"
            workdir = stack.enter_context(Workdir.locked(config.workdir, create=create))
            workdir.check_resumable(config.trajectory())
        if cluster is not None:
            rendezvous.meet(
                cluster,
                _identity(config),
                timeout_s=config.start_timeout_s,
                token=os.environ.get("DIST_TRAIN_TOKEN", ""),
            )
        with watchdog.bound(
            config.start_timeout_s + 60.0,
            "TensorFlow did not start with its peers within {seconds}, although all had arrived;"
            " one of them died, or its port is closed to this host",
        ):
            with _quiet_stderr():
                from dist_train import replicas

            strategy = replicas.create(config.strategy, config.devices, cluster)
        request.reclaim()
        from dist_train import loop

        return loop.run(task, config, strategy, cluster, workdir, request)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Holds back what C++ writes to stderr, and shows it if the body fails.

    TensorFlow's import says in several lines that there is no GPU, whatever its log level.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, contextlib.ExitStack() as stack:
        stderr = os.dup(2)
        stack.callback(os.close, stderr)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(stderr, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(stderr, 2)


def versions() -> dict[str, str]:
    """Of Python and of the packages whose numbers matter."""
    names = ("dist_train", "tensorflow", "keras", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _identity(config: Config) -> dict[str, Any]:
    """What must be equal on all workers, by name."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _PER_WORKER}
    identity = {**settings, **versions(), "source": _digest(_sources())}
    if (path := task.source_file(config.task)) is not None and path.is_file():
        identity["task source"] = _digest([path])
    return identity


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.rglob("*.py"))


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
