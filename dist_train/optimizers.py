"""Optimizers and learning-rate schedules by name, and the averaged weights."""

import contextlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer

from dist_train.errors import UsageError, one_line

# Arguments of every optimizer that have a setting of their own, or that would do again what the
# step does.
_OURS = {
    "learning_rate", "weight_decay", "global_clipnorm", "use_ema", "ema_momentum",
    "ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps", "name", "kwargs",
}  # fmt: skip


@keras.saving.register_keras_serializable("dist_train")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise over `warmup_steps`, then a decay by name until `total_steps`.

    With s the number of updates that were made: (s + 1) / warmup_steps of the peak during the rise;
    then, with p = (s - warmup_steps) / (total_steps - warmup_steps): constant 1; linear 1 - p;
    cosine (1 + cos πp) / 2 (Loshchilov and Hutter, 2017, without restarts); step 0.1 from p = 1/2
    and 0.01 from p = 3/4.
    """

    def __init__(self, peak: float, decay: str, warmup_steps: int, total_steps: int):
        self.peak = peak
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        length = max(1, self.total_steps - self.warmup_steps)
        p = tf.clip_by_value((step - self.warmup_steps) / length, 0.0, 1.0)
        decayed = {
            "constant": lambda: tf.ones_like(p),
            "linear": lambda: 1.0 - p,
            "cosine": lambda: 0.5 * (1.0 + tf.cos(math.pi * p)),
            "step": lambda: tf.where(p < 0.5, 1.0, tf.where(p < 0.75, 0.1, 0.01)),
        }[self.decay]()
        rise = (step + 1.0) / max(1, self.warmup_steps)
        return self.peak * tf.where(step < self.warmup_steps, rise, decayed)

    def get_config(self) -> dict:
        return {
            "peak": self.peak,
            "decay": self.decay,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


def by_name() -> dict[str, type[keras.optimizers.Optimizer]]:
    """{name in small letters: class} of Keras's optimizers, without those that wrap others."""
    no_names = ("Optimizer", "TFOptimizer", "LossScaleOptimizer", "MultiOptimizer")
    return {
        key.lower(): value
        for key, value in vars(keras.optimizers).items()
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
        and key not in no_names
    }


def make(
    name: str,
    *,
    learning_rate: float,
    lr_schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int = 0,
    weight_decay: float | None = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    further: Mapping[str, Any] | None = None,
) -> keras.optimizers.Optimizer:
    """A Keras optimizer by its name ('sgd', 'AdamW', …), in any capitals.

    Args:
      further: arguments of this optimizer alone, momentum for example.

    Raises:
      UsageError: Keras has none of that name, or it takes no such argument; those that there are
        are listed.
    """
    classes = by_name()
    if name.lower() not in classes:
        raise UsageError(f"optimizer={name!r} is not one of {', '.join(sorted(classes))}")
    rate: float | WarmupSchedule = learning_rate
    if warmup_steps or lr_schedule != "constant":
        rate = WarmupSchedule(learning_rate, lr_schedule, warmup_steps, total_steps)
    options: dict = {"learning_rate": rate}
    if weight_decay is not None:  # not given otherwise: AdamW has a default of its own
        options["weight_decay"] = weight_decay
    if clip_norm is not None:
        options["global_clipnorm"] = clip_norm
    if ema is not None:
        options |= {"use_ema": True, "ema_momentum": ema}
    chosen = classes[name.lower()]
    options |= _checked(name, chosen, further or {})
    try:
        return chosen(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer={name}: {one_line(error)}") from error


def _checked(name: str, chosen: type, further: Mapping[str, Any]) -> dict[str, Any]:
    """The further arguments, in the types of their defaults."""
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(chosen).parameters.items()
        if key not in _OURS
    }
    checked = {}
    for key, value in further.items():
        if key in _OURS:
            raise UsageError(
                f"optimizer_args: {key} is not set there; see --learning_rate, --weight_decay,"
                " --clip_norm, --ema, --dtype and --gradient_accumulation"
            )
        if key not in known:
            raise UsageError(
                f"optimizer_args: {name} has no {key!r}; it has {', '.join(sorted(known))}"
            )
        kind = type(known[key])
        if kind is float and type(value) is int:
            value = float(value)
        if kind in (bool, int, float, str) and type(value) is not kind:
            raise UsageError(
                f"optimizer_args: {key}={value!r} is a {type(value).__name__}; use a"
                f" {kind.__name__} such as {known[key]}"
            )
        checked[key] = value
    return checked


class _Local(TFOptimizer):
    """The update of Keras's other backends in the place of TensorFlow's.

    Keras's TensorFlow optimizer sums the gradients over the replicas itself, after it has clipped
    each replica's own, and then leaves the replica context to update. Both are wrong here: the
    gradients are reduced already and equal everywhere. Each variable from its gradient is what is
    wanted; the variables' aggregation is 'none', so an assignment reaches the replica's own copy.
    """

    _backend_update_step = BaseOptimizer._backend_update_step
    _apply_weight_decay = BaseOptimizer._apply_weight_decay
    _backend_increment_gradient_accumulators = (
        BaseOptimizer._backend_increment_gradient_accumulators
    )
    _overwrite_model_variables_with_average_value = (
        BaseOptimizer._overwrite_model_variables_with_average_value
    )


def update_locally(optimizer: keras.optimizers.Optimizer) -> None:
    """Lets `apply` update the calling replica's variables from gradients that are reduced already.

    Puts `_Local` before TFOptimizer among the bases of the optimizer's class, so what the class
    itself overrides still counts: Nadam and Muon have parts of their own.
    """
    own = type(optimizer)
    optimizer.__class__ = type(own.__name__, (own, _Local), {"__module__": own.__module__})
    # The step counter alone asks for an aggregation, and with it for a merge of the replicas.
    optimizer._iterations.value._aggregation = tf.VariableAggregation.NONE
    for inner in getattr(optimizer, "optimizers", ()):  # of a MultiOptimizer
        update_locally(inner)


def check_scaling(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuses an optimizer that takes the gradients for scaled: the step has undone that.

    Raises:
      UsageError: it is such a one.
    """
    wraps = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if wraps or optimizer.loss_scale_factor is not None:
        raise UsageError(
            "Task.optimizer scales the loss by itself; leave out LossScaleOptimizer and"
            " loss_scale_factor: --dtype=mixed_float16 scales it"
        )


def outline(optimizer: keras.optimizers.Optimizer) -> str:
    """Its class and settings, as far as they can be told."""
    name, rate = type(optimizer).__name__, getattr(optimizer, "_learning_rate", None)
    if callable(rate) and not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return name  # Keras would take down the function's code, and warn of it
    try:
        settings = optimizer.get_config()
    except (NotImplementedError, TypeError, ValueError, AttributeError):  # of the user's own
        return name
    settings.pop("name", None)  # Keras numbers them
    return name + json.dumps(settings, sort_keys=True, default=lambda value: type(value).__name__)


@contextlib.contextmanager
def averaged_weights(
    strategy: tf.distribute.Strategy, model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> Iterator[None]:
    """Within it the model has the moving average of its weights, if the optimizer keeps one."""
    if not optimizer.use_ema:
        yield
        return
    pairs = list(
        zip(model.trainable_variables, optimizer._model_variables_moving_average, strict=True)
    )

    @tf.function(autograph=False)
    def swap() -> None:
        def replica() -> None:
            for variable, average in pairs:
                value = tf.identity(variable.value)
                variable.assign(average.value)
                average.assign(value)

        strategy.run(replica)

    swap()
    try:
        yield
    finally:
        swap()


def last_rate(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """[] float32, the learning rate of the last update; Keras itself tells that of the next one."""
    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        # Keras asks it so too. There was none yet if all steps were left out.
        rate = rate(tf.maximum(tf.convert_to_tensor(optimizer._iterations.value) - 1, 0))
    elif callable(rate):
        rate = rate()
    # A mirrored variable is no number by itself.
    return tf.cast(tf.convert_to_tensor(getattr(rate, "value", rate)), tf.float32)
