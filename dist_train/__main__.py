"""The command `dist-train`: flags -> Config -> train."""

import faulthandler
import gc
import logging as python_logging
import os
import signal
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from absl import flags, logging

from dist_train import options, workdir
from dist_train.config import Config
from dist_train.errors import DistTrainError, Stopped, UsageError, one_line
from dist_train.storage import is_remote

_MULTI_WORKER = ("multi_worker", "multi-worker")


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    try:
        if flags.FLAGS.compare is not None:
            return _compare([flags.FLAGS.compare, *argv[1:]], flags.FLAGS.output)
        _train(options.from_flags(flags.FLAGS, argv[1:], _saved()))
    except DistTrainError as error:
        return _report(error, str(error), error.exit_status)
    except KeyboardInterrupt as error:
        return _report(error, "interrupted before the first step", Stopped.exit_status)
    except MemoryError as error:
        return _report(error, "out of memory; use --input=stream or a smaller --batch_size", 1)
    except Exception as error:
        # The user's own code failed, or ours did; the traceback is one flag away.
        text = f"{type(error).__name__}: {one_line(error)} (--v=1 shows the traceback)"
        return _report(error, _place(error) + text, 1)
    return 0


def _saved() -> dict[str, Any]:
    """The settings of the run that an evaluation or prediction is about, as far as they are known.

    Of several workers the chief alone need see its folder, and all must have the same settings.
    """
    folder = flags.FLAGS.workdir
    alone = flags.FLAGS.mode == "evaluate" and flags.FLAGS.strategy not in _MULTI_WORKER
    if folder is None or is_remote(folder) or not (alone or flags.FLAGS.mode == "predict"):
        return {}
    return workdir.saved_settings(folder)


def _place(error: BaseException) -> str:
    """'mine.py:12: ', the innermost line that is the user's own; '' if there is none."""
    paths = map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))
    libraries = (os.path.dirname(__file__), *paths)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        generated = frame.filename.startswith("<") or "__autograph_generated" in frame.filename
        if not generated and not frame.filename.startswith(libraries):
            return f"{os.path.relpath(frame.filename)}:{frame.lineno}: "
    return ""


def _train(config: Config) -> None:
    # Of TensorFlow half a million objects stay. To look whether they are garbage, at each of some
    # hundred collections, would take a quarter of the default run. The process is ours alone here.
    gc.disable()
    from dist_train import start, task

    task.check(config)
    with start.ready(config) as session:
        from dist_train import loop

        gc.freeze()
        gc.enable()
        loop.run(None, session)


def _compare(folders: list[str], output: str | None) -> int:
    from dist_train import comparison

    if len(folders) < 2:
        raise UsageError(f"compare={folders[0]} alone; give two runs or more: --compare a b")
    runs = [comparison.Run.read(folder) for folder in folders]
    print(comparison.table(runs))
    path = Path(output or "compare.png")
    comparison.draw(runs, path)
    print(f"\nthe curves of all: {path}")
    return 0


# Of a run that failed, where `_leaves_at_once`: with it go its frames, and with them the strategy
# and its datasets, whose destruction may wait for peers that are gone.
_kept: list[BaseException] = []


def _leaves_at_once(status: int) -> bool:
    """Whether the process ends without the interpreter's end.

    With its peers gone TensorFlow's orderly shutdown waits for them, or aborts. And Python's gives
    signals back their fatal default, while the same request may still come again, from the launcher
    after the scheduler.
    """
    return flags.FLAGS.strategy in _MULTI_WORKER or status == Stopped.exit_status


def _report(error: BaseException, message: str, status: int) -> int:
    if _leaves_at_once(status):
        _kept.append(error)
    if logging.get_verbosity() >= logging.DEBUG:
        logging.exception("%s", message, exc_info=error)
    else:
        word = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "error"
        print(f"{word}: {message}", file=sys.stderr)
    return status


def _is_ours(record: python_logging.LogRecord) -> bool:
    """TensorFlow and Keras inform through the same logger; only their warnings are of interest."""
    ours = record.pathname.startswith(os.path.dirname(__file__))
    return ours or record.levelno > python_logging.INFO or logging.get_verbosity() > logging.INFO


class _Formatter(python_logging.Formatter):
    """Information as it is, anything else with its level: the log is for reading."""

    def format(self, record: python_logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return (
            text if record.levelno <= python_logging.INFO else f"{record.levelname.lower()}: {text}"
        )


def _reopen_streams() -> None:
    """Gives /dev/null to those that are closed (`>&-`), whose numbers other files would get."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


def run() -> None:
    """The console script."""
    _reopen_streams()
    faulthandler.register(signal.SIGQUIT)  # like a JVM: the stacks, and on it goes
    options.define_flags(flags.FLAGS)
    options.define_help(flags.FLAGS)
    try:
        argv = options.parse(flags.FLAGS, sys.argv)
    except flags.Error as error:
        print(f"error: {options.explain(error, flags.FLAGS)}", file=sys.stderr)
        sys.exit(UsageError.exit_status)
    except SystemExit:  # --help was answered; absl's status for it is 1
        sys.exit(0)
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(_Formatter())
    logging.get_absl_handler().addFilter(_is_ours)
    if logging.get_verbosity() < logging.INFO:
        logging.set_verbosity(logging.INFO)
    status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if _leaves_at_once(status):
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
