"""A run in small, for tests of what is saved of it."""

import keras
import numpy as np
import tensorflow as tf

from dist_train import storage
from dist_train.checkpoint import Checkpoints


class SavedRun:
    """A model whose weights all equal the step that was saved last."""

    def __init__(self, folder, keep=3, width=4, optimizer=keras.optimizers.Adam, **options):
        self.folder = folder
        self.model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(width)])
        self.optimizer = optimizer()
        self.optimizer.build(self.model.trainable_variables)
        self.checkpoints = Checkpoints(
            storage.opened(str(folder)),
            lambda: tf.train.Checkpoint(model=self.model, optimizer=self.optimizer),
            keep=keep,
            **options,
        )

    def path(self, step):
        return self.folder / f"step-{step:08d}"

    def save(self, *steps, best=False, value=None):
        for step in steps:
            self.save_in_background(step, best, value)
        self.checkpoints.wait()

    def save_in_background(self, step, best=False, value=None):
        self.fill(step if value is None else value)
        self.checkpoints.save(step, best=best)
        self.fill(-1)  # at once: what is written must be a copy

    def restore(self, name=None):
        """The restored step, once all weights are found to be that step's."""
        self.fill(-1)
        step = self.checkpoints.restore(name)
        values = {float(v) for w in self.model.get_weights() for v in np.ravel(w)}
        assert values == {-1.0 if step is None else float(step)}
        return step

    def fill(self, value):
        self.model.set_weights([np.full_like(w, value) for w in self.model.get_weights()])
