"""The guard: runs one worker, and takes the worker's whole process tree down with it.

    python -I -S guard.py CPUS COMMAND...

It runs beside the worker, on the worker's host: a launcher that is killed can clean nothing up.

- It is the worker's parent and a child subreaper: a descendant that double-forks, calls setsid or
  ignores SIGTERM still becomes its child, so "no children left" is the whole truth about the tree.
- The worker gets a parent-death signal: it cannot outlive a guard that is itself killed.
- Its standard input is a socket to the launcher; on another machine, to `launch.agent`. End of
  file: the launcher is gone, kill all.

Each byte from the launcher is the number of a signal for the worker. It answers in lines of text:

    pid 4242         the worker runs
    beat 1200        the worker has written its heartbeat file; content, normally the step
    state T          before a signal is passed on: the worker's state in /proc (T: stopped)
    exit -9 oom      the worker has ended: exit status, or minus the signal; `oom`: out of memory,
                     says the kernel; else `-`
    unrunnable 2     the command could not be executed: errno

As a script it imports nothing of this package and little of the standard library: starting it takes
about 12 ms.
"""

import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_BEAT_INTERVAL_MS = 500
# What a worker leaves behind (a resource tracker, say) may tidy up this long before SIGKILL.
_LEFTOVER_S = 1.0
# Only a process stuck in the kernel outlives SIGKILL this long.
_KILL_S = 10.0


def adopt_orphans() -> None:
    """Makes this process the one that its orphaned descendants are handed to."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_tree() -> list[int]:
    """Kills and reaps every descendant of this process, which has called `adopt_orphans`.

    Returns:
        The process ids that outlived SIGKILL for 10 s; normally none.
    """
    deadline = time.monotonic() + _KILL_S
    while _reap() is not None:
        # Again and again: what is forked between the look and the kill is handed to us later.
        if time.monotonic() > deadline:
            return descendants()
        _signal_all(descendants(), signal.SIGKILL)
        time.sleep(0.002)
    return []


def descendants() -> list[int]:
    """The process ids of this process's living descendants; zombies do not live."""
    children: dict[int, list[int]] = {}
    zombies = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))):
            state, parent = stat
            children.setdefault(parent, []).append(int(entry))
            if state in "ZX":
                zombies.add(int(entry))
    found = list(children.get(os.getpid(), ()))
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, ()))
    return [pid for pid in found if pid not in zombies]


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
    except OSError:
        return None
    return state.decode(), int(parent)


def _reap() -> dict[int, int] | None:
    """Collects ended children: pid -> exit status or minus the signal; None: there are none."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended or None
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _say(line: str) -> None:
    """Says something to the user, among the worker's own errors."""
    os.write(2, f"dist-launch: {line}\n".encode())


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


class _Guard:
    def __init__(self, control: int, command: list[str], cpus: set[int]):
        self._control = control
        self._command = command
        self._cpus = cpus
        parent = os.environ.get("TMPDIR") or "/tmp"
        self._directory = os.path.join(parent, f"dist-launch-{os.getpid()}-{os.urandom(4).hex()}")
        self._heartbeat = os.path.join(self._directory, "heartbeat")
        self._beat = ""

    def run(self) -> None:
        adopt_orphans()
        try:
            os.mkdir(self._directory, 0o700)
            os.environ["DIST_LAUNCH_HEARTBEAT"] = self._heartbeat
        except OSError as error:
            _say(f"not watched for stalls, no folder for a heartbeat: {error}")
        # A handler, not SIG_IGN: exec gives handlers, but not ignored signals, their default back.
        # Slurm may send its notice before the time limit (SIGUSR1) to every process of a step.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        wake, wake_in = os.pipe()
        os.set_blocking(wake_in, False)
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        oom_kills = _oom_kills()

        worker, failure = self._start_worker()
        self._tell(f"unrunnable {failure}" if failure else f"pid {worker}")
        status = self._watch(worker, wake)
        if status is not None:
            oom = status == -signal.SIGKILL and (_oom_kills() > oom_kills or _in_kernel_log(worker))
            self._tell(f"exit {status} {'oom' if oom else '-'}")
            self._end_leftovers()
        for pid in kill_tree():
            _say(f"process {pid} outlives SIGKILL: it is stuck in the kernel")
        self._remove_directory()

    def _start_worker(self) -> tuple[int, int]:
        """Returns its process id, and errno if its command cannot be executed.

        Waits for the exec: before it, a signal would be lost in the handlers it has from us.
        """
        guard = os.getpid()
        error, error_in = os.pipe()  # exec closes it
        worker = os.fork()
        if worker == 0:
            try:
                self._become_worker(guard)
            except OSError as failure:
                os.write(error_in, str(failure.errno).encode())
            finally:
                os._exit(127)
        os.close(error_in)
        return worker, int(os.read(error, 16) or 0)

    def _become_worker(self, guard: int) -> None:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it died before the parent-death signal was in force
            os._exit(1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two
            signal.signal(number, signal.SIG_DFL)
        if self._cpus:
            os.sched_setaffinity(0, self._cpus)
        os.execvp(self._command[0], self._command)

    def _watch(self, worker: int, wake: int) -> int | None:
        """Serves the launcher until the worker ends (its status) or all is to be killed (None)."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(_BEAT_INTERVAL_MS)]
            if wake in ready:
                os.read(wake, 4096)
            self._tell_beat()
            status = (_reap() or {}).get(worker)
            if status is not None:
                return status
            if self._control in ready:
                requests = self._receive()
                if not requests:
                    return None
                for number in requests:
                    self._pass_on(worker, number)

    def _pass_on(self, worker: int, number: int) -> None:
        state, _ = _stat(worker) or ("X", 0)
        self._tell(f"state {state}")
        if number == signal.SIGKILL:
            _signal_all(descendants(), number)
        elif number == signal.SIGQUIT:
            # Asks for stacks, but kills who has no handler, such as a shell around the trainer.
            _signal_all([pid for pid in descendants() if _catches(pid, number)], number)
        else:
            try:
                os.killpg(worker, number)
                os.killpg(worker, signal.SIGCONT)  # a stopped process handles nothing
            except ProcessLookupError:
                return

    def _end_leftovers(self) -> None:
        _signal_all(descendants(), signal.SIGTERM)
        deadline = time.monotonic() + _LEFTOVER_S
        while _reap() is not None and time.monotonic() < deadline:
            time.sleep(0.005)

    def _tell(self, line: str) -> None:
        try:
            os.write(self._control, line.encode() + b"\n")
        except OSError:
            return  # the launcher is gone, which the next read finds out

    def _receive(self) -> bytes:
        try:
            return os.read(self._control, 64)
        except OSError:
            return b""

    def _tell_beat(self) -> None:
        try:
            time_ns = os.stat(self._heartbeat).st_mtime_ns
            with open(self._heartbeat, errors="replace") as file:
                content = " ".join(file.read(64).split())
        except OSError:
            return
        # The time is part of the comparison: a worker that only touches the file is alive too.
        if f"{time_ns} {content}" != self._beat:
            self._beat = f"{time_ns} {content}"
            self._tell(f"beat {content}")

    def _remove_directory(self) -> None:
        try:
            for name in os.listdir(self._directory):
                os.unlink(os.path.join(self._directory, name))
            os.rmdir(self._directory)
        except OSError:
            return  # the temporary directory's own cleaner will do


def _catches(pid: int, number: int) -> bool:
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) & 1 << (number - 1))


def _oom_kills() -> int:
    """How many processes of this cgroup the kernel killed for want of memory, as far as it says."""
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return 0
    count = 0
    for _, controllers, path in groups:
        if controllers == "memory":  # cgroup v1
            root, name = "/sys/fs/cgroup/memory", "memory.oom_control"
        elif controllers == "":
            root, name = "/sys/fs/cgroup", "memory.events"
        else:
            continue
        # In a container the path may be the host's, while its own group is mounted at the root.
        for candidate in (f"{root}{path}/{name}", f"{root}/{name}"):
            if os.path.exists(candidate):
                with open(candidate) as file:
                    lines = [line.split() for line in file if line.startswith("oom_kill ")]
                count += sum(int(value) for _, value in lines)
                break
    return count


def _in_kernel_log(pid: int) -> bool:
    """Whether the kernel's log, where it may be read, says so of this process."""
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        while True:  # one record a read, until there is none (BlockingIOError)
            record = os.read(log, 8192)
            if b"ut of memory: Killed process %d (" % pid in record:
                return True
    except OSError:
        return False
    finally:
        os.close(log)


def main() -> None:
    """Runs the worker named on the command line until its tree is gone."""
    cpus, command = sys.argv[1], sys.argv[2:]
    control = os.dup(0)  # not inheritable, unlike 0
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    guard(control, command, {int(cpu) for cpu in cpus.split(",") if cpu})


def guard(control: int, command: list[str], cpus: set[int]) -> None:
    """Runs a worker until its tree is gone, in a process that has no other work.

    Args:
        control: the socket to the launcher.
        command: the worker's.
        cpus: CPU numbers that it is bound to; empty: not bound.
    """
    _Guard(control, command, cpus).run()


if __name__ == "__main__":
    main()
