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

ROOT = Path(__file__).parents[2]
_FOLDER = Path(__file__).parent
# A peer needs about 10 s; one that has to compile first, half a minute.
_TIMEOUT_S = 150.0
_GRACE_S = 10.0


@dataclasses.dataclass(frozen=True)
class Figure:
    """What one run of a contender yields.

    Attributes:
      value: steps per second; of the whole command, seconds.
      loss: after one epoch, on the 10,000 examples that are held out.
    """

    value: float
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One line of the table.

    Attributes:
      name: for --only.
      label: for the table.
      rival: the name of the contender of ours that it is compared with; None: it is one of ours.
      goal: how many times as fast ours is to be; of the whole command, its seconds at most.
      module: what must be installed.
      script: of the peer, with its arguments after the data; or None.
      through: the command that starts the workers, if any.
      flags: of dist-train, where it is one of ours.
      epochs: of dist-train in all, the first of which warms up; 0: the command without flags.
    """

    name: str
    label: str
    rival: str | None = None
    goal: float | None = None
    module: str = "tensorflow"
    script: tuple[str, ...] | None = None
    through: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    epochs: int = 0

    def measure(self, python: str, scratch: Path) -> Figure:
        """Runs it once, from start to end.

        Args:
          python: the interpreter that has its module.
          scratch: a folder with the mnist.npz that peers read; compilers keep things there from
            run to run, and TensorFlow what it leaves behind.

        Raises:
          subprocess.SubprocessError: it failed or did not end; the message has its last lines.
        """
        if self.script is not None:
            script, *arguments = self.script
            through = (python, *self.through) if self.through else ()
            # torchrun starts Python by itself.
            inner = () if "torch.distributed.run" in through else (python,)
            data = str(scratch / "mnist.npz")
            out = run([*through, *inner, str(_FOLDER / script), data, *arguments], scratch)
            figure = json.loads(re.findall(r"FIGURE (\{.*\})", out)[-1])
            return Figure(figure["steps_per_second"], figure["loss"])
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            command = [python, "-m", "dist_train", f"--workdir={folder}/run", *self.flags]
            if self.epochs:
                # Peers save nothing either.
                command += [f"--epochs={self.epochs}", "--checkpoint_steps=1000000000"]
            through = (python, *self.through) if self.through else ()
            begin = time.perf_counter()
            run([*through, *command], scratch)
            seconds = time.perf_counter() - begin
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        loss = next(row["loss"] for row in rows if row["kind"] == "validation")
        return Figure(steps_per_second(rows) if self.epochs else seconds, loss)


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


def run(command: Sequence[str], scratch: Path) -> str:
    """The standard output of a command, which is stopped with all that it started at a timeout.

    Args:
      command: and its arguments.
      scratch: the folder for its temporary files.

    Raises:
      subprocess.SubprocessError: it failed; the message has its last lines.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TMPDIR": str(scratch)},
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
_ONE_LINE = "--log_steps=782"  # a line an epoch, as peers read their loss

CONTENDERS = (
    # One device.
    Contender(name="dist_train", label="**dist_train**", flags=(_ONE_LINE,), epochs=9),
    Contender(
        name="dist_train_lines",
        label="dist_train, a line every 200 steps (its default)",
        rival="dist_train",
        epochs=6,
    ),
    Contender(
        name="guide",
        label="the guide's eager loop",
        rival="dist_train",
        goal=50,
        script=("peer_guide.py",),
    ),
    Contender(
        name="fit",
        label="Keras `model.fit`",
        rival="dist_train",
        goal=2,
        script=("peer_fit.py", "1"),
    ),
    Contender(
        name="fit_fast",
        label="Keras `model.fit`, jit_compile=True, steps_per_execution=100",
        rival="dist_train",
        goal=2,
        script=("peer_fit.py", "3", "fast"),
    ),
    Contender(
        name="tutorial",
        label="TensorFlow's tutorial: `tf.function`, `strategy.run` once a step",
        rival="dist_train",
        script=("peer_tutorial.py", "2", "default"),
    ),
    Contender(
        name="torch",
        label="PyTorch, eager",
        rival="dist_train",
        goal=3,
        module="torch",
        script=("peer_torch.py", "3"),
    ),
    Contender(
        name="torch_compile",
        label="PyTorch, `torch.compile`",
        rival="dist_train",
        module="torch",
        script=("peer_torch.py", "3", "compile"),
    ),
    Contender(
        name="jax",
        label="JAX, `lax.scan` over an epoch",
        rival="dist_train",
        goal=1.2,
        module="jax",
        script=("peer_jax.py", "8"),
    ),
    # Two logical CPU devices.
    Contender(
        name="mirrored",
        label="**dist_train, mirrored, 2 devices**",
        flags=("--strategy=mirrored", "--devices=2", _ONE_LINE),
        epochs=4,
    ),
    Contender(
        name="fit_mirrored",
        label="Keras `model.fit`, mirrored",
        rival="mirrored",
        goal=6,
        script=("peer_fit.py", "1", "mirrored"),
    ),
    Contender(
        name="tutorial_mirrored",
        label="TensorFlow's tutorial, mirrored",
        rival="mirrored",
        script=("peer_tutorial.py", "1", "mirrored"),
    ),
    # Two processes on this machine.
    Contender(
        name="workers",
        label="**dist_train, 2 workers**",
        through=_LAUNCH,
        flags=("--strategy=multi_worker", _ONE_LINE),
        epochs=3,
    ),
    Contender(
        name="tutorial_workers",
        label="TensorFlow's tutorial, 2 workers",
        rival="workers",
        through=_LAUNCH,
        script=("peer_tutorial.py", "1", "multi_worker"),
    ),
    Contender(
        name="ddp",
        label="torchrun DDP on gloo, 2 workers",
        rival="workers",
        goal=2,
        module="torch",
        through=_TORCHRUN,
        script=("peer_ddp.py", "1"),
    ),
    Contender(name="command", label="**`dist-train` without flags, exec to exit**", goal=8),
)
