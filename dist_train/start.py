"""Start: from the settings to a running group of workers that agree, and then the loop.

Everything that can go wrong before TensorFlow is imported is found before it is: an import takes
seconds, and after it a missing peer means a wait that no signal ends.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import environments, rendezvous, stopping, versions, watchdog
from dist_train import task as tasks
from dist_train.cluster import Cluster
from dist_train.config import Config
from dist_train.deferred import deferred
from dist_train.errors import Stopped, UsageError
from dist_train.session import Session
from dist_train.storage import is_remote
from dist_train.workdir import Workdir

if TYPE_CHECKING:
    import tensorflow as tf

    from dist_train.result import Result

# A multi-worker strategy can be made once in a process, before anything else that TensorFlow does;
# a second run of the same shape uses it again.
_strategies: "dict[tuple, tf.distribute.Strategy]" = {}


def train(
    task: "tasks.Task | Callable[..., tasks.Task] | None" = None, config: Config | None = None
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
      RunError: the run failed; what was saved is intact.
      Stopped: a signal asked to stop; the state was saved.
    """
    if task is None:
        tasks.check(config or Config())
    with ready(config or Config()) as session:
        from dist_train import loop

        return loop.run(task, session)


@contextlib.contextmanager
def ready(config: Config) -> Iterator[Session]:
    """The session of a run: its workers have met and agree, and TensorFlow is up.

    Raises:
      UsageError: settings or environment cannot be used.
      RunError: the workers did not meet.
      Stopped: a signal asked to stop.
    """
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(stopping.listening(config.grace_period_s))
        cluster = workdir = None
        if environments.is_evaluator(os.environ):
            config = dataclasses.replace(config, mode="follow", strategy="default", devices=0)
        else:
            cluster = environments.find_cluster(os.environ, config.strategy, config.start_timeout_s)
        if cluster is None or cluster.is_chief:
            workdir = stack.enter_context(_open_workdir(config))
            workdir.check_resumable(config.trajectory())
        strategy = _strategies.get((config.strategy, config.devices, cluster))
        if strategy is None and cluster is not None:
            rendezvous.meet(
                cluster,
                _identity(config),
                timeout_s=config.start_timeout_s,
                token=os.environ.get("DIST_TRAIN_TOKEN", ""),
            )
        if strategy is None:
            strategy = _create_strategy(config, cluster)
            _strategies[config.strategy, config.devices, cluster] = strategy
        request.reclaim()
        yield Session(
            config=config, strategy=strategy, cluster=cluster, workdir=workdir, request=request
        )


def _open_workdir(config: Config) -> contextlib.AbstractContextManager[Workdir]:
    local = not is_remote(config.workdir or "")
    folder = Path(config.workdir or "")
    if config.mode == "predict" and local and not folder.is_dir():
        raise UsageError(f"workdir={folder} does not exist")
    if config.mode in ("follow", "predict") and local:  # a run that goes on holds the lock
        return contextlib.nullcontext(Workdir(folder))
    # A follower may begin before the run does.
    return Workdir.locked(config.workdir, create=config.mode in ("train", "follow"))


def _create_strategy(config: Config, cluster: Cluster | None) -> "tf.distribute.Strategy":
    # Its C++ reports the absence of GPUs as an error; its failures come as exceptions too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with watchdog.bound(
        config.start_timeout_s + 60.0,
        "TensorFlow did not start with its peers within {seconds}, although all had arrived; one of"
        " them died, or its port is closed to this host",
    ):
        # TensorFlow imports matplotlib where it is installed, for pictures that Keras can draw: a
        # fifth of its import, in each of the workers.
        with _quiet_stderr(), deferred("matplotlib", "pyplot", "patches"):
            from dist_train import replicas

        return replicas.create(config.strategy, config.devices, cluster)


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
        except Exception as error:
            if isinstance(error, Stopped):
                raise
            os.dup2(stderr, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(stderr, 2)


def _identity(config: Config) -> dict[str, Any]:
    """What must be equal on all workers, by name."""
    path = tasks.source_file(config.task)
    code = versions.source_digest([path] if path is not None and path.is_file() else [])
    return {**config.shared(), **versions.installed(), "source": code}
