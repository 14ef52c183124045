"""One worker fails: all stop, the first failure is named, its status is the launcher's."""

import os
import signal
import sys
import time

import pytest


def test_exit_status_and_last_lines_of_the_first_failure_are_reported(launcher):
    script = "[ $DIST_LAUNCH_INDEX = 1 ] && { echo oh no >&2; exit 3; }; exec sleep 60"
    result = launcher.run("--workers=3", "--", "sh", "-c", script)
    assert result.status == 3
    assert "first failure" in result.err
    assert "worker 1 (pid " in result.err
    assert "  | oh no" in result.err
    assert "worker 0, worker 2: stopped on request, killed by SIGTERM" in result.err


def test_worker_that_exits_0_early_does_not_stop_the_others(launcher):
    script = "[ $DIST_LAUNCH_INDEX = 0 ] && exit 0; sleep 0.5; echo still here"
    result = launcher.run("--workers=2", "--", "sh", "-c", script)
    assert result.status == 0
    assert b"[worker 1] still here\n" in result.out


def test_killed_worker_gives_137(launcher):
    script = "[ $DIST_LAUNCH_INDEX = 0 ] && kill -KILL $$; exec sleep 60"
    result = launcher.run("--workers=2", "--", "sh", "-c", script)
    assert result.status == 137
    assert "killed by SIGKILL" in result.err
    assert "out of memory" not in result.err


def test_worker_killed_by_a_signal_without_a_name_is_restarted_as_any_other(launcher, python):
    killed = python("os.kill(os.getpid(), 40)")
    result = launcher.run("--workers=1", "--max_restarts=1", *killed)
    assert result.status == 168
    assert result.err.count("killed by signal 40") == 2
    assert "restart 1 of 1" in result.err


def test_worker_that_ignores_sigterm_is_killed_after_the_grace_period(launcher, python):
    source = """
if INDEX == 0:
    while not os.path.exists("ready"):
        time.sleep(0.01)
    sys.exit(4)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("ready", "w").close()
time.sleep(60)
"""
    result = launcher.run("--workers=2", "--grace_period_s=0.5", *python(source))
    assert result.status == 4
    assert "worker 1: killed by SIGKILL from the launcher" in result.err
    assert result.seconds > 0.5


@pytest.mark.parametrize("worker_ends", ["sys.exit(5)", "os.kill(os.getpid(), 9)", "sys.exit(0)"])
def test_grandchildren_in_new_sessions_that_ignore_sigterm_die_with_the_worker(
    launcher, python, tmp_path, worker_ends
):
    source = f"""
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            open("child-%d" % os.getpid(), "w").close()
            time.sleep(60)
        os._exit(0)
while len([name for name in os.listdir() if name.startswith("child-")]) < 2:
    time.sleep(0.01)
{worker_ends}
"""
    launcher.run("--workers=1", *python(source))
    assert len(list(tmp_path.glob("child-*"))) == 2
    assert launcher.alive() == {}


def test_sigterm_reaches_the_process_behind_a_shell(launcher):
    # The shell waits for its child; a signal to the shell alone would leave the trainer running.
    script = "[ $DIST_LAUNCH_INDEX = 0 ] && { sleep 0.2; exit 3; }; sleep 60; true"
    result = launcher.run("--workers=2", "--grace_period_s=60", "--", "sh", "-c", script)
    assert result.status == 3  # and so before the bound of this test, which is below 60 s


def test_all_fail_at_once(launcher):
    result = launcher.run("--workers=4", "--", "sh", "-c", "echo broken import; exit 9")
    assert result.status == 9
    assert result.err.count("first failure") == 1
    assert "  | broken import" in result.err
    assert all(f"worker {index}" in result.err for index in range(4))


def test_failure_comes_before_the_louder_peers_that_lost_it(launcher, python):
    # TensorFlow's peers notice within milliseconds, while the culprit still tidies up.
    source = """
if INDEX == 1:
    print("ValueError: bad data", file=sys.stderr)
    sys.stderr.close()
    peers = ["going-0", "going-2"]
    while not all(os.path.exists(peer) for peer in peers):
        time.sleep(0.01)
    while any(os.path.exists(f"/proc/{open(peer).read()}") for peer in peers):
        time.sleep(0.01)
    sys.exit(7)
print("UnavailableError: Socket closed")
with open("pid-%d" % INDEX, "w") as file:
    file.write(str(os.getpid()))
os.rename("pid-%d" % INDEX, "going-%d" % INDEX)
while not os.path.exists("going-%d" % (2 - INDEX)):
    time.sleep(0.01)
sys.exit(1)
"""
    result = launcher.run("--workers=3", *python(source))
    assert result.status == 7
    assert "worker 1 (pid " in result.err.partition("first failure")[2].partition("\n")[0]
    assert "worker 0, worker 2: lost a peer, exit status 1" in result.err


def test_lost_peer_is_the_first_failure_when_nothing_explains_it(launcher):
    script = "[ $DIST_LAUNCH_INDEX = 1 ] && { echo Socket closed; exit 1; }; exec sleep 60"
    result = launcher.run("--workers=2", "--", "sh", "-c", script)
    assert result.status == 1
    assert "worker 1 (pid " in result.err


def test_missing_command_is_127_and_one_line(launcher):
    result = launcher.run("--workers=2", "--", "no-such-command", "--flag")
    assert result.status == 127
    assert result.err == "dist-launch: command not found: no-such-command\n"


def test_a_command_beside_the_launcher_need_not_be_on_the_path(launcher, tmp_path):
    name = os.path.basename(sys.executable)
    done = launcher.run(
        "--workers=1", "--", name, "-c", "print('found')", env={"PATH": str(tmp_path)}
    )
    assert done.status == 0, done.err
    assert b"found" in done.out


def test_file_without_permission_is_126_and_one_line(launcher, tmp_path):
    (tmp_path / "train.sh").write_text("exit 0\n")
    result = launcher.run("--", "./train.sh")
    assert result.status == 126
    assert result.err.count("\n") == 1


def test_script_with_a_missing_interpreter_is_127(launcher, tmp_path):
    (tmp_path / "train").write_text("#!/no/such/interpreter\n")
    (tmp_path / "train").chmod(0o755)
    result = launcher.run("--workers=2", "--", "./train")
    assert result.status == 127
    assert "could not be run: No such file or directory" in result.err


def test_killed_guard_takes_its_worker_along(launcher, eventually, tmp_path):
    script = "touch up-$DIST_LAUNCH_INDEX; setsid sleep 61 & exec sleep 60"
    # The one thing that nobody removes then is the folder of the heartbeat.
    env = {"TMPDIR": str(tmp_path)}
    process = launcher.start("--workers=2", "--", "sh", "-c", script, env=env)
    eventually(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    guard = min(pid for pid, command in launcher.alive().items() if "guard.py" in command)
    os.kill(guard, signal.SIGKILL)
    result = launcher.finish(process)
    assert result.status == 137
    assert "died with its guard" in result.err


def _memory_cgroup():
    """Makes a cgroup of 64 MiB; None where that is not allowed."""
    name = f"dist-launch-test-{os.getpid()}"
    for path, limit in (
        (f"/sys/fs/cgroup/{name}", "memory.max"),
        (f"/sys/fs/cgroup/memory/{name}", "memory.limit_in_bytes"),
    ):
        try:
            os.mkdir(path)
        except OSError:
            continue
        if os.path.exists(os.path.join(path, limit)):
            with open(os.path.join(path, limit), "w") as file:
                file.write(str(64 << 20))
            return path
        os.rmdir(path)
    return None


def test_out_of_memory_is_said(launcher, python):
    cgroup = _memory_cgroup()
    if cgroup is None:
        pytest.skip("needs the right to make a cgroup with a memory limit")
    source = f"""
if INDEX == 1:
    with open("{cgroup}/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    hoard = b"x" * (200 << 20)
time.sleep(60)
"""
    try:
        result = launcher.run("--workers=2", *python(source))
    finally:
        time.sleep(0.1)
        os.rmdir(cgroup)
    assert result.status == 137
    assert "out of memory, says the kernel" in result.err
