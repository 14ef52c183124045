"""Program: what a step computes of some examples: loss, metrics, the objective to derive."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_train.errors import UsageError

# The places of two of the sums; see `Program.sum_names`.
LOSS, WEIGHT = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a step computes; made in the strategy's scope.

    Attributes:
      model: called with training=True or False.
      loss: fn(y, outputs) -> [batch] float losses; see `example_loss`.
      training_loss: likewise, what training minimizes; None: the same.
      padded: why a batch may be padded, and what to do; None: it never is.
      metrics: {name: fn(y, outputs) -> [batch]}.
      preprocess: fn(x, y, seed) -> (x, y), or None.
      seed: for `preprocess`.
      parts: into how many parts a replica splits its share of a batch.
    """

    model: keras.Model
    loss: Callable[[Any, Any], tf.Tensor]
    metrics: Mapping[str, Callable[[Any, Any], tf.Tensor]]
    preprocess: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None
    seed: int = 0
    parts: int = 1
    training_loss: Callable[[Any, Any], tf.Tensor] | None = None
    padded: str | None = None

    @property
    def sum_names(self) -> tuple[str, ...]:
        """The names of the sums that a batch yields; 'weight' counts its real examples."""
        return ("loss", "weight", *self.metrics)

    @property
    def mean_names(self) -> list[str]:
        """The names of the means over examples that a run reports."""
        return [name for name in self.sum_names if name != "weight"]

    def sums(
        self, examples: Any, ids: tf.Tensor, epoch: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(objective, sums) of some examples.

        Args:
          examples: (x, y) with arrays [b, …].
          ids: [b] int32, their indices in the source; below 0: padding, which adds nothing.
          epoch: [] int32 in training; None in evaluation.

        Returns:
          objective: [] float32, the summed loss and the model's own losses (regularization, and
            means over the batch), which count once per real example, so that they are divided out
            with it.
          sums: [len(sum_names)] float32.
        """
        training = epoch is not None
        weights = tf.cast(ids >= 0, tf.float32)
        x, y = self.prepared(examples, self._seeds(ids, epoch))
        outputs = tf.nest.map_structure(as_float32, self.model(x, training=training))
        loss_of = self.training_loss if training and self.training_loss else self.loss
        loss = tf.reduce_sum(_per_example("loss", loss_of(y, outputs), ids) * weights)
        metrics = [
            tf.reduce_sum(_per_example(f"metric {name}", fn(y, outputs), ids) * weights)
            for name, fn in self.metrics.items()
        ]
        count = tf.reduce_sum(weights)
        objective = loss
        if training and self.model.losses:
            self._check_added_losses()
            added = [tf.cast(loss, tf.float32) for loss in self.model.losses]  # of two precisions
            objective += count * tf.add_n(added)
        return objective, tf.stack([loss, count, *metrics])

    def gradients(
        self,
        examples: Any,
        ids: tf.Tensor,
        epoch: tf.Tensor | None,
        *,
        scale: tf.Tensor | None = None,
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """(gradients, sums) of some examples; for the arguments and the sums see `sums`.

        Args:
          scale: what the objective, and with it each gradient, is multiplied by; None: nothing.

        Returns:
          gradients: of the objective by each trainable weight, float32 in the weight's shape.
        """
        with tf.GradientTape() as tape:
            objective, sums = self.sums(examples, ids, epoch)
            if scale is not None:
                objective *= scale
        gradients = tape.gradient(
            objective,
            [variable.value for variable in self.model.trainable_variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        # An embedding's gradient comes as the rows that were looked up: the sum wants all of them.
        dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
        return [tf.cast(gradient, tf.float32) for gradient in dense], sums

    def dependence(self, examples: Any) -> str | None:
        """What is wrong with a loss or a metric whose value for one example depends on the others.

        It changes with the padding and with the number of replicas. A keras.losses object that a
        function calls gives such a value, its mean over the batch, and so does what sets [batch]
        against [batch, 1].

        Args:
          examples: (x, y) with arrays [b, …], some of which differ.

        Returns:
          None, if all is well.

        Raises:
          UsageError: the examples do not fit the model, or its outputs the functions.
        """
        count = len(tf.nest.flatten(examples)[0])
        ids = tf.range(count)
        x, y = self.prepared(examples)
        try:
            outputs = tf.nest.map_structure(as_float32, self.model(x, training=False))
        except ValueError as error:
            if (misfit := _misfit(self.model, x)) is not None:
                raise UsageError(misfit) from error
            raise

        def copies(array: tf.Tensor) -> tf.Tensor:
            """The first example in all places: the shapes are what the functions know."""
            if not array.shape.rank or array.shape[0] != count:
                return array
            copied = tf.repeat(array[:1], count, axis=0)
            if (mask := getattr(array, "_keras_mask", None)) is not None:
                copied._keras_mask = copies(mask)
            return copied

        same = tf.nest.map_structure(copies, (y, outputs))
        named = {f"metric {name}": metric for name, metric in self.metrics.items()}
        for name, function in {"loss": self.loss, **named}.items():
            value, again = (_first(name, function, (y, outputs), ids) for _ in range(2))
            alike = _first(name, function, same, ids)
            # What draws random numbers says nothing.
            if value == again and not np.isclose(value, alike, rtol=1e-3, atol=1e-5):
                return (
                    f"the {name} of an example is {value:.4g} beside {count - 1} others and"
                    f" {alike:.4g} beside copies of itself, and must not depend on them: in a"
                    " function of your own call functions of Keras, not objects of keras.losses,"
                    " and let no [batch] meet a [batch, 1]"
                )
        return None

    def prepared(self, examples: Any, seeds: tf.Tensor | None = None) -> tuple[Any, Any]:
        """(x, y) as the model and the loss see them.

        Args:
          examples: (x, y) with arrays [b, …].
          seeds: [b, 2] int32 for `preprocess`; None: not in training.

        Raises:
          UsageError: `preprocess` returned something else.
        """
        count = tf.nest.flatten(examples)[0].shape[0]
        # As model.fit does: float64 is NumPy's habit more often than anybody's intention.
        x, y = tf.nest.map_structure(narrowed, examples)
        if self.preprocess is None:
            return x, y
        found = self.preprocess(x, y, seeds)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise UsageError(f"preprocess returned a {type(found).__name__}; it must return (x, y)")
        for array in tf.nest.flatten(found):
            shape = tf.convert_to_tensor(array).shape
            if shape.rank == 0 or (shape.rank and shape[0] not in (None, count)):
                raise UsageError(
                    f"preprocess returned an array of shape {shape}; it must keep all"
                    f" {count} examples along the first axis"
                )
        return found[0], found[1]

    def _check_added_losses(self) -> None:
        """A layer sees padding as it sees examples, so what it adds may be a mean over both."""
        for layer in (self.model, *self.model._flatten_layers(include_self=False)):
            if layer._get_own_losses() and self.padded is not None:
                raise UsageError(
                    f"{layer.name} adds a loss of its own (add_loss, or an activity regularizer),"
                    f" which padding would change: {self.padded}"
                )

    def _seeds(self, ids: tf.Tensor, epoch: tf.Tensor | None) -> tf.Tensor | None:
        """[b, 2] int32, a function of (seed, epoch, example) alone; None: nobody needs them."""
        if epoch is None or self.preprocess is None:
            return None
        key = tf.random.stateless_uniform(
            [], seed=tf.stack([self.seed, epoch]),
            minval=None, maxval=None, dtype=tf.int32, alg="philox",
        )  # fmt: skip
        return tf.stack([tf.broadcast_to(key, tf.shape(ids)), ids], axis=1)


def example_loss(loss: Any) -> Callable[[Any, Any], tf.Tensor]:
    """fn(y, outputs) -> [batch] from what a Task gives as its loss.

    Of a keras.losses.Loss only `call` is used: its reduction would divide by the padded batch, and
    in a strategy's scope by the number of replicas too.
    """
    loss = _by_name(loss)
    if not isinstance(loss, keras.losses.Loss):
        return loss
    kind = type(loss).__name__
    if loss.reduction == "sum":
        raise UsageError(
            f"loss {kind} has reduction='sum', and here a loss is the mean over the examples; drop"
            " it, and multiply --learning_rate by --batch_size for the same steps"
        )

    def per_example(y: Any, outputs: Any) -> tf.Tensor:
        if not tf.is_tensor(outputs):
            raise UsageError(
                f"loss {kind} is for one output, and the model has {len(outputs)}; give"
                " fn(y, outputs) -> [batch] that adds up those of each"
            )
        # As Keras does before it calls: integers, say, beside the outputs.
        y = tf.nest.map_structure(
            lambda array: keras.ops.convert_to_tensor(array, dtype=loss.dtype), y
        )
        losses = tf.convert_to_tensor(loss.call(y, outputs))
        # [batch, time], say: one loss per example is the mean over the other axes.
        return tf.reduce_mean(losses, axis=list(range(1, losses.shape.rank)))

    return per_example


def check_labels(loss: Any, y: Any, model: keras.Model, kind: str) -> None:
    """Refuses classes that the model has no output for.

    TensorFlow fails at such a label on a CPU; XLA, and a GPU, make the loss NaN.

    Args:
      loss: of the task; only of a sparse crossentropy the labels are numbers of classes.
      y: the targets, as the loss sees them.
      kind: of the examples, for the error.

    Raises:
      UsageError: a label is out of range.
    """
    loss = _by_name(loss)
    sparse = isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
    outputs: Sequence[Any] = getattr(model, "outputs", None) or ()
    if not (sparse or loss is keras.losses.sparse_categorical_crossentropy) or len(outputs) != 1:
        return
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu":
        return
    ignored, axis = (loss.ignore_class, loss.get_config().get("axis", -1)) if sparse else (None, -1)
    classes = outputs[0].shape[axis]
    labels = y if ignored is None else y[y != ignored]
    if classes is None or not labels.size or (labels.min() >= 0 and labels.max() < classes):
        return
    worst = labels.min() if labels.min() < 0 else labels.max()
    raise UsageError(
        f"a {kind} label is {worst}, and the model has {classes} outputs; labels must be 0 to"
        f" {classes - 1}"
    )


def smoothed(loss: Any, share: float) -> keras.losses.CategoricalCrossentropy:
    """The loss with labels smoothed (Szegedy et al., 2016, section 7).

    A label becomes (1 - share) of itself plus share / classes of every class.

    Raises:
      UsageError: the loss is no (Sparse)CategoricalCrossentropy object, or smooths by itself.
    """
    loss = _by_name(loss)
    sparse = isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
    if not sparse and not isinstance(loss, keras.losses.CategoricalCrossentropy):
        raise UsageError(
            f"label_smoothing={share:g} needs a loss that is a"
            " keras.losses.(Sparse)CategoricalCrossentropy, and this task's is"
            f" {getattr(loss, '__name__', type(loss).__name__)}; smooth in it, and drop the flag"
        )
    if sparse and loss.ignore_class is not None:
        raise UsageError(
            f"label_smoothing={share:g} does not know ignore_class={loss.ignore_class}; drop one"
        )
    if not sparse and loss.label_smoothing:
        raise UsageError(
            f"label_smoothing={share:g}, and the task's loss smooths by {loss.label_smoothing:g}"
            " itself; drop one"
        )
    kind = _SmoothedSparse if sparse else keras.losses.CategoricalCrossentropy
    axis = loss.get_config().get("axis", -1)
    return kind(from_logits=loss.from_logits, label_smoothing=share, axis=axis)


class _SmoothedSparse(keras.losses.CategoricalCrossentropy):
    """Of labels that are numbers of classes, [batch, …] or [batch, …, 1] as Keras takes them."""

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        labels = tf.cast(y_true, tf.int32)
        if labels.shape.rank == y_pred.shape.rank:
            labels = tf.squeeze(labels, -1)
        classes = tf.one_hot(labels, y_pred.shape[-1], dtype=y_pred.dtype)
        return super().call(classes, y_pred)


def _by_name(loss: Any) -> Any:
    if not isinstance(loss, str):
        return loss
    try:
        return keras.losses.get(loss)
    except ValueError as error:
        raise UsageError(
            f"loss={loss!r} is none of Keras; use a name such as 'mse', an object of keras.losses,"
            " or fn(y, outputs) -> [batch]"
        ) from error


def narrowed(array: tf.Tensor) -> tf.Tensor:
    """An array of the examples as the model sees it: float64 is float32."""
    return tf.cast(array, tf.float32) if array.dtype == tf.float64 else array


def as_float32(output: tf.Tensor) -> tf.Tensor:
    """An output of a model of any precision as the loss, the metrics and a user see it."""
    return tf.cast(output, tf.float32) if output.dtype.is_floating else output


def _misfit(model: keras.Model, x: Any) -> str | None:
    """Why the one input of a model does not take some examples, where their shapes tell."""
    inputs: Sequence[Any] = getattr(model, "inputs", None) or ()
    if len(inputs) != 1 or not tf.is_tensor(x):
        return None
    takes, given = inputs[0].shape[1:], tuple(x.shape[1:])
    if len(takes) == len(given) and all(a in (None, b) for a, b in zip(takes, given, strict=True)):
        return None
    return (
        f"model {model.name} takes examples of shape {takes}, and those of Task.train are of shape"
        f" {given} when they reach it; reshape them in preprocess or in its first layer"
    )


def _first(name: str, function: Callable, arguments: tuple[Any, Any], ids: tf.Tensor) -> float:
    """The value of the first example."""
    return float(_per_example(name, function(*arguments), ids)[0])


def _per_example(name: str, values: Any, ids: tf.Tensor) -> tf.Tensor:
    values = tf.cast(values, tf.float32)
    if values.shape.rank != 1 or values.shape[0] != ids.shape[0]:
        batched = values.shape.rank and values.shape[0] == ids.shape[0]
        raise UsageError(
            f"the {name} function returned the shape {values.shape}; it must return one value per"
            f" example, [{ids.shape[0]}]: "
            + ("reduce the other axes" if batched else "leave out the reduction over the batch")
        )
    return values
