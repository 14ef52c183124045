"""dist_train: one training loop for TensorFlow, the same numbers on every tf.distribute strategy.

`import dist_train` is cheap: TensorFlow is imported when training starts, because the number of
logical devices and the workers' connections must be settled before it initializes.
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
