"""Workers that stop, stall, disagree or run out of room: each cause is named, nothing is lost."""

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from trajectory import assert_same_run, wait_for_step

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LONG = ["--epochs=5000", "--eval_epochs=0", "--log_steps=50", "--learning_rate=0.001"]


def command(task="task", *flags):
    return ["-m", "dist_train", f"--task={HERE / 'small.py'}:{task}", "--workdir=run", *flags]


def several(task="task", *flags):
    return command(task, "--strategy=multi_worker", *LONG, *flags)


def wait_until(condition, what, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def error(text):
    """The one line of a worker's output that says what is wrong."""
    assert "Traceback" not in text, text
    (line,) = [s for s in text.splitlines() if s.startswith(("error:", "stopped:"))]
    return line


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_frozen_worker_is_named_by_all_others(group, tmp_path, stopped):
    workers = group.start_all(3, several())
    wait_for_step(tmp_path / "run", 100, *workers)
    workers[stopped].send_signal(signal.SIGSTOP)
    for index in {0, 1, 2} - {stopped}:
        assert workers[index].wait(60) == 1
        assert re.search(rf"worker {stopped} \(\S+:\d+\) was lost", error(group.output(index)))


def test_a_worker_that_hangs_in_its_own_code_is_named_by_those_that_wait(group):
    # Its bound is for the first call too, in which the step is traced.
    flags = ["--input=stream", "--jit_compile=false", "--stall_timeout_s=12"]
    workers = group.start_all(3, several("stuck", *flags))
    for index in (0, 2):
        assert workers[index].wait(90) == 1
        (line,) = [s for s in group.output(index).splitlines() if s.startswith("error")]
        # Its own bound began at the same moment: it may have ended before theirs.
        waits = r"more than 12 s \(waiting for worker 1 \(\S+:\d+\)\); raise --stall"
        assert re.search(rf"{waits}|: worker 1 \(\S+:\d+\) was lost \(", line), line


def test_workers_whose_weights_differ_are_named_with_the_step(group):
    group.start_all(3, several("diverging"))
    assert group.wait(90) == [1, 1, 1]
    for index in range(3):
        line = error(group.output(index))
        assert re.search(
            r"weights differ since step \d+, .*: worker 1 \(\S+\) differs from the", line
        )


def test_each_worker_may_have_a_directory_of_its_own(group, tmp_path, addresses):
    flags = ["--strategy=multi_worker", "--epochs=2", "--workdir={}"]
    for _ in range(2):  # the second time all is there already, on the chief
        cluster = addresses(2)
        for index in (0, 1):
            folder = tmp_path / f"own-{index}" / "run"
            folder.parent.mkdir(exist_ok=True)
            group.start([*command()[:-1], *flags[:-1], flags[-1].format(folder)], cluster, index)
        assert group.wait() == [0, 0], group.output(0) + group.output(1)
        group.next_round()
    assert (tmp_path / "own-0" / "run" / "model.keras").is_file()
    assert not (tmp_path / "own-1" / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_request_to_stop_is_met_though_a_peer_has_gone(group, tmp_path, number):
    workers = group.start_all(2, several("task", "--grace_period_s=10"))
    wait_for_step(tmp_path / "run", 100, *workers)
    workers[1].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    begin = time.monotonic()
    workers[0].send_signal(number)
    assert workers[0].wait(30) == 75
    assert time.monotonic() - begin < 10 + 2  # the end of a process takes a moment
    line = error(group.output(0))
    assert line.startswith(f"stopped: by {signal.Signals(number).name}")
    assert line.endswith(("before is intact", "if more is needed"))


def test_a_stopped_run_ends_though_what_it_holds_cannot_be_taken_down(group, tmp_path):
    worker = group.start(command("clinging", *LONG))
    wait_for_step(tmp_path / "run", 50, worker)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 75
    assert ", saved;" in error(group.output(0))


def test_many_signals_for_one_request_do_not_cost_the_last_steps(group, tmp_path):
    worker = group.start(command("patient", *LONG))
    wait_for_step(tmp_path / "run", 100, worker)
    # A scheduler's, those that a launcher and a shell pass on: some come when all is saved already.
    deadline = time.monotonic() + 30
    while worker.poll() is None and time.monotonic() < deadline:
        worker.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    assert worker.wait(30) == 75
    assert ", saved;" in error(group.output(0))


def test_a_kill_in_the_midst_of_a_save_costs_only_the_steps_since_the_one_before(group, tmp_path):
    flags = ["--epochs=40", "--eval_epochs=1", "--log_steps=1", "--checkpoint_steps=3"]
    folder = tmp_path / "run" / "checkpoints"
    for _ in range(4):
        worker = group.start(command("task", *flags))
        have = newest(folder)
        wait_until(lambda: newest(folder) > have and any(folder.glob("partial-[sb]*")), "a save")  # noqa: B023
        worker.kill()
        worker.wait()
    group.next_round()
    group.start(command("task", *flags))
    group.start([*command("task", *flags)[:-5], "--workdir=whole", *flags])
    assert group.wait(120) == [0, 0], group.output(0) + group.output(1)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_kill_within_an_evaluation_costs_nothing(group, tmp_path):
    flags = ["--epochs=3", "--log_steps=1", "--batch_size=100", "--jit_compile=false"]
    flags += ["--checkpoint_steps=4"]
    task = "dies_in_evaluation"
    group.start(command(task, *flags))
    assert group.wait() == [-signal.SIGKILL]
    group.start(command(task, *flags))
    group.start([*command(task)[:-1], "--workdir=whole", *flags])
    assert group.wait()[1:] == [0, 0], group.output(1)
    assert "resumed after step" in group.output(1)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_dropout_of_two_workers_goes_on_where_a_kill_left_it(group, tmp_path):
    flags = ["--strategy=multi_worker", "--epochs=20", "--log_steps=1", "--checkpoint_steps=7"]
    workers = group.start_all(2, command("dropout", *flags))
    wait_for_step(tmp_path / "run", 30, *workers)
    workers[0].kill()
    assert group.wait() == [-signal.SIGKILL, 1]
    group.next_round()
    group.start_all(2, command("dropout", *flags))
    assert group.wait() == [0, 0], group.output(0)
    assert "resumed after step" in group.output(0)
    group.next_round()
    group.start_all(2, [*command("dropout")[:-1], "--workdir=whole", *flags])
    assert group.wait() == [0, 0], group.output(0)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def newest(folder):
    return max((path.name for path in folder.glob("step-*")), default="")


# A disk without room.


@pytest.fixture
def small_disk(tmp_path):
    """fn(MiB) -> a folder on a filesystem of that size."""
    mounted = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


SHORT = ["--epochs=6", "--eval_epochs=0", "--log_steps=1", "--checkpoint_steps=4"]


@pytest.fixture(scope="module")
def short(new_group, tmp_path_factory):
    """The workdir of that run, on a disk with room."""
    folder = tmp_path_factory.mktemp("short")
    group = new_group(folder)
    group.start(command("task", *SHORT))
    assert group.wait(120) == [0], group.output(0)
    return folder / "run"


@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk_ends_the_run_with_what_was_saved_before(group, small_disk, short, size):
    disk = small_disk(size)
    on_disk = [*command()[:-1], f"--workdir={disk}/run", *SHORT, "--keep_checkpoints=1000"]
    worker = group.start(on_disk)
    assert worker.wait(60) == 1
    line = error(group.output(0))
    assert "No space left on device" in line
    assert "intact" in line
    have = sorted((disk / "run" / "checkpoints").glob("*"))
    assert have
    assert all(path.name.startswith(("step-", "best-")) for path in have)

    # With room again, and on with the run.
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    group.next_round()
    group.start(on_disk)
    assert group.wait(120) == [0], group.output(0)
    assert "resumed after step" in group.output(0)
    assert_same_run(disk / "run", short)
