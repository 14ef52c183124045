"""Faults of all kinds at moments of all kinds: it ends as promised, and nothing is lost.

Each draw is a seed; a failure replays with its seed. `pytest -m soak` makes SOAK_DRAWS draws (50)
from SOAK_SEED (100) on; without it there are a dozen.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from faults import AT_A_STEP, AT_THE_START, SETTINGS, draw
from trajectory import assert_same_run

from dist_train.rows import read_rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRAIN = [f"--task={HERE / 'small.py'}:smooth", "--epochs=30", "--eval_epochs=7", "--log_steps=1"]
STEPS = 480
CAUSES = {
    "sigkill": r"SIGKILL",
    "sigstop": r"worker \d.*(stopped|stalled|no heartbeat|SIGKILL)|was lost",
    "full disk": r"No space left on device",
    "other flag": r"disagree on batch_size: 64 and 50",
    "never": r"worker {worker} \(\S+\) never arrived",
    "port taken": r"cannot listen on its own address",
}
ENDS = {
    "sigterm": {75},
    "sigint": {75},
    "other flag": {2},
    "never": {1},
    "full disk": {0, 1},  # 0: nothing was left to be saved
    "kill all and truncate": {137},
}


@pytest.fixture(scope="session")
def whole(new_group, tmp_path_factory):
    """Each of the settings, trained by one process without a fault: fn(name) -> workdir."""
    folder = tmp_path_factory.mktemp("whole")

    def train(name):
        if not (folder / name).exists():
            group = new_group(folder)
            group.start(["-m", "dist_train", *TRAIN, f"--workdir={name}", *SETTINGS[name]])
            assert group.wait(120) == [0], group.output(0)
        return folder / name

    return train


class Ordeal:
    """One draw on its way."""

    def __init__(self, plan, folder):
        self.plan = plan
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.disk = folder / "disk"
        self.disk.mkdir()
        self.workdir = self.disk / "run"
        self.ballast = self.disk / "ballast"
        self.report = []
        self.truncated = None  # the file, and what identifies it
        self.launcher = None
        self.mounted = False

    def run(self):
        for number, each in enumerate(self.plan.rounds):
            self.log = self.folder / f"round-{number}.log"
            (self.folder / "struck").unlink(missing_ok=True)
            before, damaged = self.checkpoints(), self.is_newest_damaged()
            status = self.one(each)
            text = self.log.read_text(errors="replace")
            self.report.append(f"{each}: {status}")
            assert self.living() == {}, "orphans"
            assert "Traceback" not in text, text
            resumed = [
                int(s.replace(",", "")) for s in re.findall(r"resumed after step ([\d,]+)", text)
            ]
            if before and each.fault is None and self.newest_step() < STEPS:
                assert resumed, text
            if resumed and before:
                assert resumed[0] >= before[-2 if damaged else -1], (resumed, before)
            self.check_end(each, status, text)
        assert status == 0

    def check_end(self, each, status, text):
        fault = each.fault
        if fault is None:
            assert status == 0, text
            return
        if not self.struck:  # the run was over before
            assert status == 0, text
            return
        ends = ENDS.get(fault.kind, {0})
        if ends == {75} and self.struck_at > STEPS - 100:
            ends = {0, 75}  # it may have made its last steps before it heard of the request
        assert status in ends, text
        if (cause := CAUSES.get(fault.kind)) is not None:
            assert re.search(cause.format(worker=fault.worker), text), text

    def one(self, each):
        """Starts the launcher, lets the fault strike, and waits for the end; its status."""
        fault = each.fault
        self.struck = False
        helped = fault is not None and fault.kind in AT_THE_START
        program = [str(HERE / "faults.py")] if helped else ["-m", "dist_train"]
        restarts = 0 if fault is not None and fault.kind in ENDS else 3
        command = [
            sys.executable, "-m", "launch",
            f"--workers={each.workers if each.strategy == 'multi_worker' else 1}",
            f"--max_restarts={restarts}", "--stall_timeout_s=20", "--grace_period_s=10", "--",
            sys.executable, *program, *TRAIN, f"--strategy={each.strategy}",
            f"--devices={each.workers if each.strategy == 'mirrored' else 0}",
            f"--workdir={self.workdir}", f"--input={each.input}", "--keep_checkpoints=5",
            f"--steps_per_loop={each.steps_per_loop}", *SETTINGS[self.plan.settings],
            f"--checkpoint_steps={self.plan.checkpoint_steps}",
            f"--start_timeout_s={8 if fault is not None and fault.kind == 'never' else 60}",
        ]  # fmt: skip
        environ = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        environ |= {
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "-1",
            "ORDEAL": self.mark,
            "FAULT": json.dumps(vars(fault) if fault else None),
        }
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(
                command, cwd=self.folder, env=environ, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        if fault is not None:
            self.strike(each)
        return self.launcher.wait(180)

    def strike(self, each):
        fault = each.fault
        if fault.kind == "killed early":
            time.sleep(0.5 + fault.step / 100)  # within the import, the rendezvous, the first steps
        elif fault.kind in AT_A_STEP:
            base = self.step() if self.workdir.exists() else 0
            while self.step() < min(base + fault.step, STEPS - 1):
                if self.launcher.poll() is not None:
                    return
                time.sleep(0.005)
        workers = self.living()
        if fault.kind in AT_THE_START and fault.kind != "killed early":
            self.struck = True
            return
        if fault.worker not in workers or self.launcher.poll() is not None:
            return
        self.struck, self.struck_at = fault.kind != "killed early", self.step()
        number = {"sigterm": 15, "sigint": 2, "sigstop": 19}.get(fault.kind, 9)
        if fault.kind == "full disk":
            self.fill_disk()
        elif fault.kind == "kill all and truncate":
            for pid in workers.values():
                self.kill(pid, signal.SIGKILL)
            self.launcher.wait(60)
            self.truncate()
        else:
            self.kill(workers[fault.worker], number)

    def fill_disk(self):
        descriptor = os.open(self.ballast, os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(1 << 12))
        os.close(descriptor)
        self.launcher.wait(120)
        self.ballast.unlink()

    def truncate(self):
        steps = self.checkpoints()
        if len(steps) > 1:
            (data,) = (self.workdir / "checkpoints" / f"step-{steps[-1]:08d}").glob("state.data*")
            os.truncate(data, data.stat().st_size // 2)
            self.truncated = data, data.stat().st_ino

    def is_newest_damaged(self):
        """Whether what was truncated is still there; a round that ends early leaves it so."""
        if self.truncated is None:
            return False
        path, inode = self.truncated
        return path.exists() and path.stat().st_ino == inode

    def kill(self, pid, number):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            self.struck = False

    def checkpoints(self):
        found = (self.workdir / "checkpoints").glob("step-*")
        return sorted(int(path.name[5:]) for path in found)

    def newest_step(self):
        return max(self.checkpoints(), default=0)

    def step(self):
        rows = read_rows(self.workdir / "metrics.jsonl")
        return max((row["step"] for row in rows), default=0)

    def living(self):
        """{index: pid} of what still runs of this draw's workers, from /proc."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == getattr(self.launcher, "pid", 0):
                continue
            try:
                environ = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"ORDEAL={self.mark}".encode() in environ and b"--strategy" in command:
                match = re.search(rb"DIST_LAUNCH_INDEX=(\d+)", environ)
                if b"guard.py" not in command:
                    found[int(match[1]) if match else -1] = int(entry.name)
        return found


@pytest.fixture
def ordeal(tmp_path):
    """fn(plan) -> Ordeal; all of it has ended and is unmounted afterwards."""
    made = []

    def make(plan):
        made.append(Ordeal(plan, tmp_path))
        if any(r.fault and r.fault.kind == "full disk" for r in plan.rounds):
            mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(made[-1].disk)]
            if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
                pytest.skip("a tmpfs, for the full disk, cannot be mounted here")
            made[-1].mounted = True
        return made[-1]

    yield make
    for each in made:
        if each.launcher is not None and each.launcher.poll() is None:
            os.killpg(each.launcher.pid, signal.SIGKILL)
            each.launcher.wait()
        if each.mounted:
            subprocess.run(["umount", "-l", str(each.disk)], check=True)


def check(ordeal, whole, seed):
    plan = draw(seed)
    expected = whole(plan.settings)
    each = ordeal(plan)
    try:
        each.run()
        assert_same_run(
            each.workdir,
            expected,
            names=("loss", "accuracy"),
            loss={"rtol": 5e-4, "atol": 5e-5},
            weight={"rtol": 2e-3, "atol": 5e-4},
        )
    except BaseException:
        print(f"seed {seed}: {plan}", *each.report, sep="\n  ")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_whatever_strikes_the_run_ends_on_the_uninterrupted_numbers(ordeal, whole, seed):
    check(ordeal, whole, seed)


FIRST = int(os.environ.get("SOAK_SEED", "100"))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("SOAK_DRAWS", "50"))))
def test_soak(ordeal, whole, seed):
    check(ordeal, whole, seed)


def test_a_dozen_draws_meet_every_kind_of_fault():
    kinds = {draw(seed).rounds[0].fault.kind for seed in range(12)}
    assert kinds == set(AT_A_STEP + AT_THE_START)


def test_a_seed_gives_one_plan():
    assert [draw(seed) for seed in range(50)] == [draw(seed) for seed in range(50)]
