"""Build: from a task and the settings to the parts that a run needs, in the strategy's scope."""

import contextlib
import zlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from dist_train import lanes, layers, optimizers
from dist_train.best import Best
from dist_train.config import Config
from dist_train.errors import DistTrainError, UsageError, one_line
from dist_train.evaluation import make_evaluation
from dist_train.examples import Arrays, Source, checksum, spaced
from dist_train.input import Input, choose
from dist_train.program import Program, check_labels, example_loss, narrowed, smoothed
from dist_train.reading import fetch
from dist_train.rows import Row
from dist_train.step import LossScale, TrainLoop
from dist_train.task import Task
from dist_train.workers import Workers

_TRIED = 5  # examples
# What a model that cannot be called may raise.
_REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError, tf.errors.OpError)


class Parts:
    """What a run is made of.

    Attributes:
      inputs: {"train" | "validation" | "test": Input}, of what the task has.
      total_steps: of the whole run.
      log_steps: between two lines of the log: as asked for, and no more than between validations.
      model, optimizer, program: as they are named.
      train_loop, evaluation: see `step` and `evaluation`.
      step: [] int64, of the last checkpoint.
      pending: [sums] float64, the sums since the last line of the log. They are state too: a
        resumed run logs the same means.
      best: the best validation so far, by --best_metric; it is state as well.
      outline: {what: a text} that a resumed run should find as it was, a few examples among it.
      variables: all state, for a broadcast.
    """

    def __init__(
        self, task: Task, config: Config, strategy: tf.distribute.Strategy, workers: Workers
    ):
        self._config = config
        self._strategy = strategy
        self._replicas = workers.replicas
        self._check_used(task)
        self._make_inputs(task, workers)
        schedule = self.inputs["train"].schedule
        self.total_steps = config.epochs * schedule.steps_per_epoch
        self.log_steps = config.log_steps
        if task.validation is not None and config.eval_epochs:
            self.log_steps = min(self.log_steps, schedule.steps_per_epoch * config.eval_epochs)

        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self.model = self._model(task)
            self.optimizer = self._own_optimizer(task) if task.optimizer else self._optimizer()
            optimizers.check_scaling(self.optimizer)
            self.optimizer.build(self.model.trainable_variables)
            self._loss_scale = LossScale() if config.dtype == "mixed_float16" else None
        if task.preprocess is None:  # otherwise the loss sees other labels
            for kind in self.inputs:
                source = getattr(task, kind)
                if isinstance(source, Arrays) and source.in_memory:
                    check_labels(task.loss, source.y, self.model, kind)
        sizes = {
            "batch_size": config.batch_size,
            "examples": schedule.examples,
            "replicas": self._replicas,
            "parts": config.gradient_accumulation,
        }
        layers.check_batch_statistics(self.model, **sizes)
        self._jit, self._jit_reason = layers.choose_jit(
            config.jit_compile,
            self.model,
            gpu=_on_gpu(),
            replicas=self._replicas,
            strings=any(array.dtype == tf.string for array in tf.nest.flatten(self._some["train"])),
        )
        self.program = Program(
            model=self.model,
            loss=example_loss(task.loss),
            training_loss=self._training_loss(task.loss),
            metrics=task.metrics,
            preprocess=task.preprocess,
            seed=config.seed,
            parts=config.gradient_accumulation,
            padded=layers.padding(**sizes),
        )
        self._check_functions()
        self._check_held_out()
        self._lanes = self._choose_lanes()
        self.outline = self._outline(task)
        del self._some  # which may be large ones
        self.train_loop = TrainLoop(
            strategy,
            self.program,
            self.optimizer,
            log_steps=self.log_steps,
            loss_scale=self._loss_scale,
            skip_not_finite=config.on_nan == "skip",
            lanes=self._lanes,
            jit_compile=self._jit,
        )
        self.evaluation = make_evaluation(
            strategy, self.program, overlap=self._replicas == 1 and not _on_gpu()
        )
        with tf.device("CPU:0"):
            zeros = np.zeros(len(self.program.sum_names))
            self.pending = tf.Variable(zeros, trainable=False, name="pending")
            self.step = tf.Variable(np.int64(0), trainable=False, name="step")
        self.best = self._best()

    def _make_inputs(self, task: Task, workers: Workers) -> None:
        config = self._config
        named = {"train": task.train, "validation": task.validation, "test": task.test}
        sources = {kind: source for kind, source in named.items() if source is not None}
        self._resident, self._input_reason = choose(
            config.input, list(sources.values()), workers.local_replicas
        )
        self._some = {kind: _some(source) for kind, source in sources.items()}
        with workers.together("the choice of the input"):
            alike = workers.all_say(self._resident)
        self.inputs = {
            kind: Input(
                source,
                self._strategy,
                resident=self._resident,
                batch_size=config.batch_size,
                seed=config.seed,
                shuffle=config.shuffle and kind == "train",
                also_streamed=not alike,
            )
            for kind, source in sources.items()
        }

    def _model(self, task: Task) -> keras.Model:
        """The task's, made in the scope; what could not be trained is refused."""
        model = task.model()
        if not isinstance(model, keras.Model):
            raise UsageError(
                f"Task.model gave a {type(model).__name__}; it must give a keras.Model"
            )
        if not model.built or not model.weights:
            self._call_once(model, task)
        if self.total_steps and not model.trainable_variables:
            raise UsageError(f"model {model.name} has no weights to train; unfreeze a layer")
        created_here = self._strategy.extended.variable_created_in_scope
        if not all(created_here(variable.value) for variable in model.variables):
            raise UsageError(
                f"model {model.name} was made before Task.model was called, outside the strategy's"
                " scope; make it in that function"
            )
        return model

    def _call_once(self, model: keras.Model, task: Task) -> None:
        """Makes the weights of a model that takes its input's shape from its first input."""
        x, y = tf.nest.map_structure(narrowed, self._some["train"])
        try:
            if task.preprocess is not None:
                x, _ = task.preprocess(x, y, None)
            # Without values, as `fit` does, which nothing can count.
            model(
                tf.nest.map_structure(
                    lambda array: keras.KerasTensor((None, *array.shape[1:]), array.dtype.name), x
                ),
                training=False,
            )
        except _REFUSALS as error:
            raise UsageError(
                f"model {model.name} has no weights yet, and cannot be called on an example of"
                f" Task.train: {one_line(error)}"
            ) from error

    def _own_optimizer(self, task: Task) -> keras.optimizers.Optimizer:
        assert task.optimizer is not None
        optimizer = task.optimizer()
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise UsageError(
                f"Task.optimizer gave a {type(optimizer).__name__}; it must give a keras.Optimizer"
            )
        return optimizer

    def _optimizer(self) -> keras.optimizers.Optimizer:
        config = self._config
        return optimizers.make(
            config.optimizer,
            learning_rate=config.scaled_rate,
            lr_schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            total_steps=self.total_steps,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            ema=config.ema,
            further=config.optimizer_options,
        )

    def _outline(self, task: Task) -> dict[str, str]:
        found = {}
        for kind in [kind for kind in self._some if kind != "test"]:
            count = self.inputs[kind].schedule.examples
            found[f"{kind} examples"] = f"{checksum(count, _arrays(self._some[kind])):08x}"
        named = isinstance(task.loss, str)
        loss = task.loss if named else getattr(task.loss, "__name__", type(task.loss).__name__)
        return found | {"loss": str(loss), "optimizer": optimizers.outline(self.optimizer)}

    def _best(self) -> Best:
        config, names = self._config, self.program.mean_names
        if config.best_metric not in names:
            raise UsageError(
                f"best_metric={config.best_metric!r} is not one of this task's: {', '.join(names)}"
            )
        of_loss = config.best_mode == "auto" and config.best_metric == "loss"
        return Best(least=config.best_mode == "min" or of_loss)

    def _training_loss(self, loss: Any) -> Any:
        share = self._config.label_smoothing
        return example_loss(smoothed(loss, share)) if share else None

    def _check_used(self, task: Task) -> None:
        """Refuses settings that this task would leave without an effect."""
        config = self._config
        # Not learning_rate: a task that takes the config may use it in an optimizer of its own.
        for name in (
            "optimizer_args", "scale_lr", "lr_schedule", "warmup_steps", "weight_decay",
            "clip_norm", "ema",
        ):  # fmt: skip
            if task.optimizer is not None and getattr(config, name) != getattr(Config, name):
                raise UsageError(
                    f"{name}={getattr(config, name)}, and the task makes its optimizer itself; set"
                    " it there, or leave Task.optimizer out"
                )
        if config.early_stopping and task.validation is None:
            raise UsageError(
                f"early_stopping={config.early_stopping} needs validation examples, and the task"
                " has none"
            )

    def _check_functions(self) -> None:
        """Tries them on a few examples; what fails as a whole fails in the first step too."""
        if self._config.mode != "train":
            return
        try:
            with layers.unchanged(self._strategy, self.model):
                problem = self.program.dependence(self._some["train"])
        except DistTrainError:
            raise
        except Exception:  # the first step fails too, and says where
            logging.debug("the functions of the task cannot be tried", exc_info=True)
            return
        if problem and self._replicas == self.program.parts == 1 and self.program.padded is None:
            logging.warning("%s; this run has one replica and no padding, so it goes on", problem)
        elif problem:
            raise UsageError(problem)

    def _choose_lanes(self) -> int:
        if self._config.mode != "train" or self._replicas > 1 or not self._jit or _on_gpu():
            return 1
        return lanes.choose(
            self.program,
            batch_size=self._config.batch_size,
            steps=self.total_steps,
            examples=self._some["train"],
        )

    def _check_held_out(self) -> None:
        """Tries one example of what has other shapes than `train`: its turn comes hours later."""
        zero, like = np.zeros(1, np.int32), _shapes(self._some["train"])
        for kind in self.inputs:
            shapes = _shapes(self._some[kind])
            if shapes == like:
                continue
            x, y = tf.nest.map_structure(lambda array: array[:1], self._some[kind])
            try:
                with layers.unchanged(self._strategy, self.model):
                    self.program.sums((x, y), tf.constant(zero), None)
            except (ValueError, TypeError, KeyError, tf.errors.OpError) as error:
                raise UsageError(
                    f"Task.{kind} has examples {shapes} where train has {like}: {one_line(error)}"
                ) from error

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """See `optimizers.averaged_weights`."""
        return optimizers.averaged_weights(self._strategy, self.model, self.optimizer)

    def row(self, step: int) -> Row:
        """How far `step` is, for the log."""
        schedule = self.inputs["train"].schedule
        epoch = -(-step // schedule.steps_per_epoch)
        return {"step": step, "epoch": epoch, "examples": schedule.examples_until(step)}

    @property
    def variables(self) -> list:
        return [
            *self.model.variables,
            *self.optimizer.variables,
            *self._scale_variables.values(),
            *self._bookkeeping.values(),
        ]

    @property
    def _scale_variables(self) -> dict[str, tf.Variable]:
        return {} if self._loss_scale is None else self._loss_scale.variables

    @property
    def _bookkeeping(self) -> dict[str, tf.Variable]:
        return {"step": self.step, "pending": self.pending, "best": self.best.variable}

    def checkpoint(self) -> tf.train.Checkpoint:
        """All state, as an object that TensorFlow can write and read."""
        seeds = layers.random_states(self.model)
        return tf.train.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            **self._bookkeeping,
            **{f"seed_{number}": seed for number, seed in enumerate(seeds)},
            **self._scale_variables,
        )

    def weight_digests(self) -> list[int]:
        """A number of 32 bits for the weights of each replica of this process."""
        local = self._strategy.experimental_local_results
        copies = zip(*(local(v.value) for v in self.model.trainable_variables), strict=True)
        return [zlib.crc32(b"".join(np.asarray(w).tobytes() for w in copy)) for copy in copies]

    def describe(self) -> list[str]:
        """Lines for the start of a log: batch arithmetic, model, input, compilation."""
        config, schedule = self._config, self.inputs["train"].schedule
        share = -(-config.batch_size // self._replicas)
        padded = "" if share * self._replicas == config.batch_size else ", the last one padded"
        weights = sum(int(np.prod(v.shape)) for v in self.model.trainable_variables)
        device = "GPU" if _on_gpu() else "CPU"
        return [
            f"batch {config.batch_size} = {self._replicas} x {share} on {device}{padded};"
            f" {schedule.examples:,} examples = {schedule.steps_per_epoch:,} steps per epoch,"
            f" {self.total_steps:,} in all",
            f"model {self.model.name}: {weights:,} weights; {self.optimizer.name}, {config.dtype}",
            f"input {'resident' if self._resident else 'stream'} ({self._input_reason});"
            f" XLA {'on' if self._jit else 'off'} ({self._jit_reason})"
            + (", two halves of a batch side by side" if self._lanes > 1 else ""),
        ]


def _on_gpu() -> bool:
    return bool(tf.config.get_visible_devices("GPU"))


def _some(source: Source) -> Any:
    """(x, y) of a few examples."""
    return tf.nest.map_structure(tf.constant, fetch(source, spaced(source, _TRIED)))


def _arrays(some: Any) -> Any:
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), some)


def _shapes(some: Any) -> Any:
    """Those of one example, in their structure."""
    return tf.nest.map_structure(lambda array: array.shape[1:].as_list(), some)


def load_weights(model: keras.Model, path: str) -> None:
    """Loads a .weights.h5 or .keras file.

    Raises:
      UsageError: it does not exist, or does not fit the model.
    """
    try:
        if path.endswith(".keras"):
            model.set_weights(keras.saving.load_model(path, compile=False).get_weights())
        else:
            model.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"initial_weights={path} cannot be used: {one_line(error)}") from error
