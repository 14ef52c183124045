"""Session: what a run has at hand once its workers have met and TensorFlow is up."""

import dataclasses
from typing import TYPE_CHECKING

from dist_train.cluster import Cluster
from dist_train.config import Config
from dist_train.stopping import StopRequest
from dist_train.workdir import Workdir

if TYPE_CHECKING:
    import tensorflow as tf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """See `start.ready`, which makes one.

    Attributes:
      config: the settings; an evaluator's are not all those that it was started with.
      strategy: as they say.
      cluster: None: this process is alone.
      workdir: None on workers other than the chief.
      request: to stop.
    """

    config: Config
    strategy: "tf.distribute.Strategy"
    cluster: Cluster | None
    workdir: Workdir | None
    request: StopRequest
