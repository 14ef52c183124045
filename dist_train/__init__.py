"""dist_train: one training loop for TensorFlow, the same numbers on every tf.distribute strategy.

`import dist_train` is cheap: TensorFlow is imported when training starts, because the number of
logical devices and the workers' connections must be settled before it initializes.

Where to look, besides this interface (task, examples, config, result, errors):

  start       start, session, environments, cluster, rendezvous, deferred, replicas, stopping,
              watchdog
  a run       loop, fit, build, state, best, timetable, pace, divergence, workers, follower
  a step      step, lanes, line, program, purity, reduction, agreement, optimizers, layers,
              evaluation
  data        schedule, permutation, input, reading, buffers, readahead, mnist
  on disk     workdir, checkpoint, momentary, storage, rows, export
  what is said    log, metrics, tensorboard, timesheet, heartbeat, profiling, outcome, report,
              curves, pictures, review, comparison, prediction
  the command     __main__, options, settings, arguments, recipes, versions
  the machine     cores, allocator
"""

from dist_train.config import Config
from dist_train.errors import DistTrainError, RunError, Stopped, UsageError
from dist_train.examples import Arrays, Dataset, Source
from dist_train.options import recipe
from dist_train.result import Result
from dist_train.start import train
from dist_train.task import Task

__all__ = [
    "Arrays",
    "Config",
    "Dataset",
    "DistTrainError",
    "Result",
    "RunError",
    "Source",
    "Stopped",
    "Task",
    "UsageError",
    "recipe",
    "train",
]
