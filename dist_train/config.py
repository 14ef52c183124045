"""Config: every setting of a run.

A setting is declared once, as a field: its default, its help, its bounds, and whether it changes
the trajectory (the sequence of batches, losses and weights). The flags (see `options`), the checks
and the comparison on a resume all follow from that.
"""

import dataclasses
from typing import Any

from dist_train import arguments
from dist_train.errors import UsageError
from dist_train.settings import converted

_MAX_TIMEOUT_S = 1e6  # sockets take no more than 2^31 ms
STRATEGIES = ("default", "mirrored", "multi_worker")


def _setting(
    default: Any,
    help: str,
    *,
    trajectory: bool = False,
    per_worker: bool = False,
    of_task: bool = False,
    choices: tuple[str, ...] = (),
    lower: float | None = None,
    upper: float | None = None,
) -> Any:
    """A field of Config.

    Args:
      trajectory: whether it must agree with the workdir's on a resume.
      per_worker: whether workers may have it otherwise: a path or a habit of one machine.
      of_task: whether nothing but a task reads it.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "trajectory": trajectory,
            "per_worker": per_worker,
            "of_task": of_task,
            "choices": choices,
            "lower": lower,
            "upper": upper,
        },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run; see each field's help, or `dist-train --help`.

    Raises:
      UsageError: a value is out of bounds, or two settings contradict each other.
    """

    strategy: str = _setting(
        "default",
        "default (one device), mirrored (the devices of this machine) or multi_worker (the"
        " processes that dist-launch, srun or mpirun has started together, or TF_CONFIG names).",
        choices=STRATEGIES,
    )
    devices: int = _setting(
        0,
        "Replicas per process. 0: all visible GPUs, or one CPU. N on a machine without GPUs: N"
        " logical CPU devices.",
        lower=0,
        upper=256,  # more than any machine has
    )
    task: str = _setting(
        "mnist",
        "A built-in name (mnist), 'package.module:name' or 'path/file.py:name' of a Task or of a"
        " function that returns one.",
        trajectory=True,
    )
    model: str = _setting(
        "mlp",
        "For the built-in task: mlp (784-64-64-10), mlp512 (784-512-512-10), cnn (16-32-64"
        " channels), cnn128 (16-64-128) or cnn5 (16-32, 64-64, 128, 128 hidden).",
        trajectory=True,
        of_task=True,
    )
    data_dir: str | None = _setting(
        None,
        "A folder with the four IDX files (plain or .gz), or an .npz with x_train, y_train,"
        " x_test, y_test. Default: the MNIST inside the package.",
        per_worker=True,
        of_task=True,
    )
    augment_shift: int = _setting(
        0,
        "For the built-in task, as the two below, in training: each picture is moved by up to so"
        " many whole pixels on each axis.",
        trajectory=True,
        of_task=True,
        lower=0,
    )
    augment_zoom: float = _setting(
        0.0,
        "Each picture shrinks or grows by up to this share on each axis.",
        trajectory=True,
        of_task=True,
        lower=0.0,
        upper=1.0,
    )
    augment_flip: bool = _setting(
        False, "Half of the pictures are mirrored, left to right.", trajectory=True, of_task=True
    )
    batch_size: int = _setting(
        64, "Examples per step over all replicas (the global batch).", trajectory=True, lower=1
    )
    epochs: int = _setting(3, "Passes over the training examples.", lower=0)
    optimizer: str = _setting("sgd", "Any Keras optimizer by its name.", trajectory=True)
    optimizer_args: str = _setting(
        "",
        "Further arguments of the optimizer, as Keras names them: 'momentum=0.9,nesterov=true'.",
        trajectory=True,
    )
    learning_rate: float = _setting(1e-3, "The (peak) learning rate.", trajectory=True, lower=0.0)
    scale_lr: int = _setting(
        0,
        "The batch size that learning_rate is meant for: the rate is multiplied by batch_size /"
        " scale_lr. 0: it is used as it is.",
        trajectory=True,
        lower=0,
    )
    lr_schedule: str = _setting(
        "constant",
        "The learning rate after the warm-up: constant; cosine or linear (to zero at the last"
        " step); step (a tenth at 1/2 and a hundredth at 3/4 of the run).",
        trajectory=True,
        choices=("constant", "cosine", "linear", "step"),
    )
    warmup_steps: int = _setting(
        0, "Steps over which the learning rate rises linearly from zero.", trajectory=True, lower=0
    )
    weight_decay: float | None = _setting(
        None, "Decoupled weight decay per step, times the rate. Default: the optimizer's own.",
        trajectory=True, lower=0.0,
    )  # fmt: skip
    clip_norm: float | None = _setting(
        None,
        "Upper bound of the gradient's global norm, applied to the sum over all replicas."
        " Default: none.",
        trajectory=True,
        lower=0.0,
    )
    ema: float | None = _setting(
        None,
        "Momentum of an exponential moving average of the weights (0.999, say); evaluation and"
        " export use the average. Default: none.",
        trajectory=True,
        lower=0.0,
        upper=1.0,
    )
    label_smoothing: float = _setting(
        0.0,
        "Share of each label's weight that is spread evenly over all classes, in training only; for"
        " losses that are a (Sparse)CategoricalCrossentropy.",
        trajectory=True,
        lower=0.0,
        upper=1.0,
    )
    gradient_accumulation: int = _setting(
        1,
        "Parts into which each replica splits its share of a batch, one after another: less"
        " memory, the same numbers.",
        lower=1,
    )
    validation_size: int = _setting(
        10_000, "Examples taken from the end of the training set.", trajectory=True, lower=0,
        of_task=True,
    )  # fmt: skip
    shuffle: bool = _setting(
        True, "A new order of the examples each epoch; false: the order of the file.",
        trajectory=True,
    )  # fmt: skip
    seed: int = _setting(
        0, "Seed of initial weights, order, augmentation and dropout.", trajectory=True, lower=0,
        upper=2**31 - 1,
    )  # fmt: skip
    steps_per_loop: int | None = _setting(
        None,
        "Steps per compiled call, at most; a call takes about a second. Default: auto, no bound.",
        lower=1,
    )
    jit_compile: str = _setting(
        "auto",
        "Compile the step with XLA: auto decides by device and layers and says what it decided.",
        choices=("auto", "true", "false"),
    )
    input: str = _setting(
        "auto",
        "resident: the examples live on each device; stream: they are read as they are needed;"
        " auto: resident where they fit.",
        choices=("auto", "resident", "stream"),
        per_worker=True,
    )
    log_steps: int = _setting(
        200,
        "Steps between two lines of the log, fewer where validations are nearer. They come when a"
        " compiled call ends.",
        lower=1,
    )
    eval_epochs: int = _setting(1, "Epochs between two validations; 0: none.", lower=0)
    workdir: str | None = _setting(
        None,
        "The folder that holds everything of the run; one that exists is resumed. Default:"
        " runs/<UTC time>.",
        per_worker=True,
    )
    checkpoint_steps: int | None = _setting(
        None, "Steps between two checkpoints. Default: the end of each epoch.", lower=1
    )
    checkpoint_secs: float | None = _setting(
        None, "Seconds between two checkpoints, besides those at steps. Default: none.", lower=0.0
    )
    keep_checkpoints: int = _setting(
        3, "Newest checkpoints that are kept, besides the best by validation.", lower=1
    )
    best_metric: str = _setting(
        "loss", "The validation metric whose best checkpoint is kept as checkpoints/best-<step>."
    )
    best_mode: str = _setting(
        "auto",
        "Whether the least or the greatest is the best; auto: the least loss, the greatest of any"
        " other metric.",
        choices=("auto", "min", "max"),
    )
    early_stopping: int = _setting(
        0,
        "End the run after so many validations in a row without a better best_metric; the test and"
        " the exports then use the best weights. 0: never.",
        lower=0,
    )
    checkpoint: str | None = _setting(
        None,
        "For --mode=evaluate and predict: a step, best, or the folder of a checkpoint. Default:"
        " the newest.",
        per_worker=True,
    )
    initial_weights: str | None = _setting(
        None, "A .weights.h5 or .keras file to start from.", trajectory=True, per_worker=True
    )
    mode: str = _setting(
        "train",
        "train; evaluate: the newest checkpoint in workdir, on validation and test examples;"
        " follow: each checkpoint as another process writes it, until the last; predict: what it"
        " says of --predict_on.",
        choices=("train", "evaluate", "follow", "predict"),
    )
    predict_on: str | None = _setting(
        None,
        "For --mode=predict: PNG or JPEG images, .npy or .npz arrays, separated by commas; patterns"
        " with * may be quoted; further arguments of the command are added. Default: none.",
    )
    output: str | None = _setting(
        None,
        "For --mode=predict: the file, CSV if its name ends in .csv, else a JSON object a line."
        " Default: JSON lines on standard output.",
    )
    dtype: str = _setting(
        "float32",
        "The Keras dtype policy; mixed_float16 comes with dynamic loss scaling.",
        trajectory=True,
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
    )
    start_timeout_s: float = _setting(
        120.0,
        "Seconds to wait for all workers to arrive.",
        lower=0.0,
        upper=_MAX_TIMEOUT_S,
        per_worker=True,
    )
    stall_timeout_s: float = _setting(
        600.0, "Seconds that a call of the loop, an evaluation or a save may take.", lower=0.0,
        upper=_MAX_TIMEOUT_S, per_worker=True,
    )  # fmt: skip
    profile_steps: str | None = _setting(
        None, "'100,120': profile steps 100 to 120 into the workdir's tensorboard/. Default: none."
    )
    grace_period_s: float = _setting(
        30.0, "Seconds that a worker has to save and leave after SIGTERM or SIGINT.", lower=0.1,
        upper=_MAX_TIMEOUT_S, per_worker=True,
    )  # fmt: skip
    on_nan: str = _setting(
        "stop",
        "At a loss that is not finite: stop; skip: leave the step out; restore: go back to the"
        " checkpoint before, and on with the batches after that step.",
        choices=("stop", "restore", "skip"),
    )
    determinism: bool = _setting(False, "Bitwise repeatable operations, where slower too.")
    progress: str = _setting(
        "auto",
        "A progress bar: auto shows it on a terminal.",
        choices=("auto", "true", "false"),
        per_worker=True,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = converted(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # the one place where a Config is written
        self._check_together()

    def _check_together(self) -> None:
        if self.strategy == "default" and self.devices > 1:
            raise UsageError(
                f"devices={self.devices} with strategy=default, which uses one device;"
                " use --strategy=mirrored"
            )
        if self.mode != "train" and self.workdir is None:
            raise UsageError(f"mode={self.mode} needs the run to evaluate: give --workdir")
        if self.warmup_steps and self.learning_rate == 0.0:
            raise UsageError("warmup_steps without a learning rate; set --learning_rate above 0")
        if self.clip_norm == 0.0:  # Keras would take it for no clipping
            raise UsageError("clip_norm=0 leaves no gradient; give a norm above 0, or none")
        if self.checkpoint is not None and self.mode not in ("evaluate", "predict"):
            raise UsageError(
                f"checkpoint={self.checkpoint!r} is for --mode=evaluate and predict; training goes"
                " on from the newest in --workdir"
            )
        if self.early_stopping and not self.eval_epochs:
            raise UsageError(
                f"early_stopping={self.early_stopping} counts validations, and eval_epochs=0 makes"
                " none; use --eval_epochs=1"
            )
        self._check_prediction()
        # Parsed here so that a bad value is found at once.
        self.profile_range  # noqa: B018
        self.optimizer_options  # noqa: B018

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The optimizer_args by name."""
        return arguments.parse("optimizer_args", self.optimizer_args)

    @property
    def scaled_rate(self) -> float:
        """The (peak) learning rate for this batch size.

        Linear in the batch size (Goyal et al., 2017, section 2.1), if a reference is given.
        """
        return self.learning_rate * (self.batch_size / self.scale_lr if self.scale_lr else 1.0)

    def _check_prediction(self) -> None:
        if self.mode == "predict":
            if not self.predict_on:
                raise UsageError("mode=predict needs --predict_on: images or arrays")
            if self.strategy != "default":
                raise UsageError(
                    f"mode=predict runs in one process on one device; leave out --strategy="
                    f"{self.strategy}"
                )
            return
        for name in ("predict_on", "output"):
            if (value := getattr(self, name)) is not None:
                raise UsageError(
                    f"{name}={value!r} is for --mode=predict; add that or leave it out"
                )

    @property
    def profile_range(self) -> tuple[int, int] | None:
        """(first, last) step to profile, or None."""
        if self.profile_steps is None:
            return None
        try:
            first, last = (int(part) for part in self.profile_steps.split(","))
        except ValueError:
            first, last = 0, -1
        if not 0 <= first < last:
            raise UsageError(
                f"profile_steps={self.profile_steps!r} is not two rising steps such as '100,120'"
            )
        return first, last

    def shared(self) -> dict[str, Any]:
        """The settings that all workers of a run must have alike."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata["per_worker"]
        }

    def trajectory(self) -> dict[str, Any]:
        """The settings that decide the sequence of batches, losses and weights."""
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["trajectory"]
        }
        if self.lr_schedule != "constant":  # it is stretched over the whole run
            settings["epochs"] = self.epochs
        return settings
