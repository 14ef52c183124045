"""The contenders of `training.py`: what each is called, how it is run, and our goal beside it."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import workload

ROOT = Path(__file__).parents[2]
_FOLDER = Path(__file__).parent
# A peer needs about 10 s; one that has to compile first, half a minute.
_TIMEOUT_S = 150.0
_GRACE_S = 10.0
_BLAS_OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


@dataclasses.dataclass(frozen=True)
class Figure:
    """What one run of a contender yields.

    Attributes:
      value: steps per second; of the whole command, seconds.
      loss: after one epoch, on the examples that are held out; None: it learns nothing.
    """

    value: float
    loss: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One line of the table.

    Attributes:
      name: for --only.
      label: for the table.
      rival: the name of the contender of ours that it is compared with, if any.
      goal: how many times as fast ours is to be, or this one where it is ours; of the whole
        command, its seconds at most.
      goal_batch: the batch that the goal is for; it is always for the MLP and SGD.
      module: what must be installed.
      script: of the peer, with words that say how; None: it is ours.
      through: the command that starts the workers, if any.
      flags: of dist-train, where it is ours.
      epochs: to take the time of, at the usual workload; 0: the command without flags.
      models: that it can train.
      usual: whether it is measured at the usual workload only.
      environment: further variables.
    """

    name: str
    label: str
    rival: str | None = None
    goal: float | None = None
    goal_batch: int = 64
    module: str = "tensorflow"
    script: tuple[str, ...] | None = None
    through: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    epochs: int = 1
    models: tuple[str, ...] = ("mlp", "cnn")
    usual: bool = False
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.script is None

    def takes(self, work: workload.Workload) -> bool:
        """Whether it is measured at a workload."""
        return work.model in self.models and (work == workload.Workload() or not self.usual)

    def goal_at(self, work: workload.Workload) -> float | None:
        """Its goal, if it has one there."""
        return self.goal if work == workload.Workload(batch=self.goal_batch) else None

    def measure(self, python: str, work: workload.Workload, scratch: Path) -> Figure:
        """Runs it once, from start to end.

        Args:
          python: the interpreter that has its module.
          work: what to train.
          scratch: a folder with the data, see `data_file`; compilers keep things there from run to
            run, and TensorFlow what it leaves behind.

        Raises:
          subprocess.SubprocessError: it failed or did not end; the message has its last lines.
        """
        data = data_file(work, scratch)
        through = (python, *self.through) if self.through else ()
        if self.script is not None:
            script, *how = self.script
            # torchrun starts Python by itself.
            inner = () if "torch.distributed.run" in through else (python,)
            arguments = workload.arguments(work, str(data), work.epochs(self.epochs), how)
            command = [*through, *inner, str(_FOLDER / script), *arguments]
            out = run(command, scratch, self.environment)
            figure = json.loads(re.findall(r"FIGURE (\{.*\})", out)[-1])
            return Figure(figure["steps_per_second"], figure["loss"])
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            command = [*through, python, "-m", "dist_train", f"--workdir={folder}/run"]
            if self.epochs:
                command += _flags(work, data, epochs=1 + work.epochs(self.epochs))
            begin = time.perf_counter()
            run([*command, *self.flags], scratch)
            seconds = time.perf_counter() - begin
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        loss = next(row["loss"] for row in rows if row["kind"] == "validation")
        return Figure(steps_per_second(rows) if self.epochs else seconds, loss)


def data_file(work: workload.Workload, scratch: Path) -> Path:
    """The .npz of a workload, as dist-train and the peers read it.

    x_train: uint8 [examples + held out, 28, 28], y_train: uint8; x_test, y_test: a few.
    """
    return scratch / f"{work.model}.npz"


def _flags(work: workload.Workload, data: Path, *, epochs: int) -> list[str]:
    return [
        f"--model={work.model}",
        f"--batch_size={work.batch}",
        f"--optimizer={work.optimizer}",
        f"--learning_rate={work.learning_rate}",
        f"--data_dir={data}",
        f"--validation_size={work.held}",
        f"--epochs={epochs}",
        f"--log_steps={work.steps}",  # a line an epoch, as peers read their loss
        # Peers save nothing either: no best one after the first, since accuracy rises.
        "--checkpoint_steps=1000000000",
        "--best_metric=accuracy",
        "--best_mode=min",
    ]


def steps_per_second(rows: Sequence[Mapping]) -> float:
    """The rate of all epochs but the first, by the wall clock, logging included.

    An epoch counts from the end of the validation before it to its own last line of training, so
    that validation, which peers do not do, is left out.

    Args:
      rows: of a metrics.jsonl.
    """
    steps, seconds = 0, 0.0
    begin = last = None
    for row in rows:
        if row["kind"] == "train":
            last = row
        elif row["kind"] == "validation":
            if begin is not None and last is not None:
                steps += last["step"] - begin["step"]
                seconds += last["time"] - begin["time"]
            begin = row
    return steps / seconds


def run(command: Sequence[str], scratch: Path, environment: Mapping[str, str] | None = None) -> str:
    """The standard output of a command, which is stopped with all that it started at a timeout.

    Args:
      command: and its arguments.
      scratch: the folder for its temporary files.
      environment: further variables.

    Raises:
      subprocess.SubprocessError: it failed; the message has its last lines.
    """
    # A BLAS that was told of another processor is a floor that is too low.
    inherited = {name: v for name, v in os.environ.items() if name not in _BLAS_OVERRIDES}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={
            **inherited,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TMPDIR": str(scratch),
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=_TIMEOUT_S)
    finally:
        _stop(process)
    if process.returncode != 0:
        last = " / ".join((out + err).strip().splitlines()[-3:])
        raise subprocess.SubprocessError(f"exit status {process.returncode}: {last[-300:]}")
    return out


def _stop(process: subprocess.Popen) -> None:
    """First by SIGTERM: torchrun and the launcher stop the workers, which have other groups."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signum)
        try:
            process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


_LAUNCH = ("-m", "launch", "--workers=2", "--")
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

CONTENDERS = (
    # One device.
    # Long enough for what only a long run does, see dist_train/lanes.py.
    Contender(name="dist_train", label="**dist_train**", epochs=21),
    Contender(
        name="dist_train_lines",
        label="dist_train, a line every 200 steps (its default)",
        rival="dist_train",
        flags=("--log_steps=200",),
        epochs=21,
        usual=True,
    ),
    Contender(
        name="stream",
        label="dist_train, `--input=stream`",
        rival="dist_train",
        goal=0.8,
        goal_batch=1024,
        flags=("--input=stream",),
        epochs=21,
        models=("mlp",),
    ),
    Contender(
        name="products",
        label="floor: the step's matrix products alone, OpenBLAS",
        rival="dist_train",
        goal=0.8,
        script=("floor.py", "products"),
        models=("mlp",),
    ),
    Contender(
        name="products_one",
        label="floor: the same, one thread",
        rival="dist_train",
        goal=0.8,
        script=("floor.py", "products"),
        models=("mlp",),
        environment={"OPENBLAS_NUM_THREADS": "1"},
    ),
    Contender(
        name="bytes",
        label="floor: the step's bytes alone, gathered, cast, weights updated",
        rival="dist_train",
        script=("floor.py", "bytes"),
        models=("mlp",),
    ),
    Contender(
        name="guide",
        label="the guide's eager loop",
        rival="dist_train",
        goal=55,
        script=("peer_guide.py",),
    ),
    Contender(
        name="fit",
        label="Keras `model.fit`",
        rival="dist_train",
        goal=2,
        script=("peer_fit.py",),
    ),
    Contender(
        name="fit_jit",
        label="Keras `model.fit`, jit_compile=True",
        rival="dist_train",
        goal=2,
        script=("peer_fit.py", "jit"),
        epochs=2,
        models=("mlp",),
    ),
    Contender(
        name="fit_many",
        label="Keras `model.fit`, jit_compile=True, steps_per_execution=100",
        rival="dist_train",
        goal=2,
        script=("peer_fit.py", "many"),
        epochs=3,
        models=("mlp",),
    ),
    Contender(
        name="tutorial",
        label="TensorFlow's tutorial: `tf.function`, `strategy.run` once a step",
        rival="dist_train",
        script=("peer_tutorial.py",),
        epochs=2,
    ),
    Contender(
        name="torch",
        label="PyTorch, eager",
        rival="dist_train",
        goal=3.5,
        module="torch",
        script=("peer_torch.py",),
        epochs=3,
    ),
    Contender(
        name="torch_compile",
        label="PyTorch, `torch.compile`",
        rival="dist_train",
        module="torch",
        script=("peer_torch.py", "compile"),
        epochs=3,
    ),
    Contender(
        name="torch_loader",
        label="PyTorch, eager, `DataLoader`",
        rival="dist_train",
        module="torch",
        script=("peer_torch.py", "loader"),
    ),
    Contender(
        name="jax",
        label="JAX, `lax.scan` over an epoch",
        rival="dist_train",
        goal=1.4,
        module="jax",
        script=("peer_jax.py",),
        epochs=8,
    ),
    # Two logical CPU devices.
    Contender(
        name="mirrored",
        label="**dist_train, mirrored, 2 devices**",
        flags=("--strategy=mirrored", "--devices=2"),
        epochs=3,
        usual=True,
    ),
    Contender(
        name="fit_mirrored",
        label="Keras `model.fit`, mirrored",
        rival="mirrored",
        goal=6,
        script=("peer_fit.py", "mirrored"),
        usual=True,
    ),
    Contender(
        name="tutorial_mirrored",
        label="TensorFlow's tutorial, mirrored",
        rival="mirrored",
        script=("peer_tutorial.py", "mirrored"),
        usual=True,
    ),
    # Two processes on this machine.
    Contender(
        name="workers",
        label="**dist_train, 2 workers**",
        through=_LAUNCH,
        flags=("--strategy=multi_worker",),
        epochs=2,
        usual=True,
    ),
    Contender(
        name="tutorial_workers",
        label="TensorFlow's tutorial, 2 workers",
        rival="workers",
        through=_LAUNCH,
        script=("peer_tutorial.py", "multi_worker"),
        usual=True,
    ),
    Contender(
        name="ddp",
        label="torchrun DDP on gloo, 2 workers",
        rival="workers",
        goal=2.5,
        module="torch",
        through=_TORCHRUN,
        script=("peer_ddp.py",),
        usual=True,
    ),
    Contender(
        name="command",
        label="**`dist-train` without flags, exec to exit**",
        goal=6,
        epochs=0,
        usual=True,
    ),
)
