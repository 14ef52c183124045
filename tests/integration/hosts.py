"""Machines for tests: network namespaces with cables between them, in a private network.

    with hosts.Network(folder, ["n1", "n2"]) as network:
        network["n1"].run(["ping", "-c1", "n2"])
        network["n2"].cut()

The sandbox is a network, mount and process namespace of its own with a bridge in it and no way
out: it refuses to start where there is a default route. Each host is a child of it with its own
network, name, process ids, /run and /etc/hosts, and a cable to the bridge. They share the file
system otherwise. `network.head` is the machine at the bridge, from which things are started.

All of it hangs on the standard input of one process, so that it ends with pytest, also by SIGKILL.
From outside, where the tests are, /proc shows all processes of all hosts.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

_NETWORK = "10.77.0"
_NETWORK6 = "fd77:0:0:77:"
# Reaps what others leave to it, and ends, with all that is in its namespace, at end of file.
_INIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); sys.stdin.read()"
_NO_WAY_OUT = """
[ -z "$(ip route show default)$(ip -6 route show default)" ] || { echo default route; exit 1; }
"""
_BEGIN = f"""
{_NO_WAY_OUT}
ip link set lo up
mount --bind "$1" /etc/hosts
mount -t tmpfs run /run
[ -z "$2" ] || hostname "$2"
"""
_BRIDGE = f"""
ip link add br0 type bridge
ip addr add {_NETWORK}.254/24 dev br0
ip addr add {_NETWORK6}:fe/64 dev br0 nodad 2>/dev/null || true
ip link set br0 up
"""
_READY = f"""
echo ready
exec "$3" -S -E -c '{_INIT}'
"""


def why_not() -> str:
    """Why there can be no hosts here; empty: there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for program in ("ip", "unshare", "nsenter", "mount"):
        if not shutil.which(program):
            return f"needs the program `{program}`"
    trial = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link"]
    made = subprocess.run(trial, capture_output=True, text=True)
    return f"may not make namespaces: {made.stderr.strip()}" if made.returncode else ""


def wait_until(holds, timeout_s=10.0):
    """Looks every 20 ms; whether it came to hold in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Host:
    """One machine."""

    def __init__(self, name, number, command, script):
        self.name = name
        self.address = f"{_NETWORK}.{number}"
        self.address6 = f"{_NETWORK6}:{number:x}"
        self._number = number
        self._started = []
        self._cable = ""
        self._head = self
        self._unshare = subprocess.Popen(
            [*command, "sh", "-ec", *script, name, sys.executable],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C of the tests is not meant for it
        )
        said = self._unshare.stdout.readline()
        if said != b"ready\n":
            said += self._unshare.stdout.read()
            self.end()
            raise RuntimeError(f"{name or 'the sandbox'} does not start: {said.decode()}")
        *self._around, self.pid = _descendants(self._unshare.pid)
        self._processes = os.readlink(f"/proc/{self.pid}/ns/pid")
        if os.readlink(f"/proc/{self.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            self.end()
            raise RuntimeError(f"{name} is in the network of the tests")

    def enter(self, command):
        """The command as one that runs on this host."""
        return ["nsenter", f"--target={self.pid}", "--all", *map(str, command)]

    def start(self, command, **options):
        """Starts a command there; options go to Popen. It ends with the host at the latest.

        Returns:
            The Popen of a program around it, which ends as it does but passes no signals on; send
            them to the process id in the attribute `inside`.
        """
        # nsenter goes to the root directory of the other mount namespace: the same folder there.
        folder = os.fspath(options.pop("cwd", "/"))
        process = subprocess.Popen(self.enter(["env", "-C", folder, *command]), **options)
        started = wait_until(lambda: process.poll() is not None or _children(process.pid))
        assert started, f"{self.name}: {command} does not start"
        process.inside = next(iter(_children(process.pid)), 0)
        self._started.append(process)
        return process

    def run(self, command, *, timeout_s=20, **options):
        """Runs a command there to its end and returns what it writes, as text."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        with self.start(command, **options) as process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert process.returncode == 0, f"{self.name}: {command}: {output}"
        return output

    def processes(self):
        """Process id (as seen by the tests) -> command line of all that lives there."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in (self.pid, *self._around):
                continue
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns/pid") != self._processes:
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
                if state not in (b"Z", b"X"):
                    found[int(entry.name)] = command
        return found

    def cut(self):
        """Pulls its cable."""
        self._in_network(self._head, f"ip link set {self._cable} down")

    def mend(self):
        """Puts its cable back."""
        self._in_network(self._head, f"ip link set {self._cable} up")

    def has_address6(self):
        """Whether it speaks IPv6."""
        return self.address6 in self.run(["ip", "-6", "addr"])

    def connect(self, head):
        """Lays the cable to the bridge."""
        self._cable, self._head = f"cable{self._number}", head
        head._around += self._around
        cable = f"ip link add {self._cable} type veth peer name eth0 netns {self.pid}"
        self._in_network(head, f"{cable}; ip link set {self._cable} master br0 up")
        self._in_network(
            self,
            f"ip addr add {self.address}/24 dev eth0; ip link set eth0 up;"
            f"ip addr add {self.address6}/64 dev eth0 nodad 2>/dev/null || true;"
            f"{_NO_WAY_OUT}",
        )

    @staticmethod
    def _in_network(host, script):
        # Not in its process namespace: `netns` means the process ids of the tests.
        enter = ["nsenter", f"--target={host.pid}", "--net", "sh", "-ec", script]
        subprocess.run(enter, check=True, capture_output=True, timeout=20)

    def end(self):
        """Ends all of it."""
        self._unshare.stdin.close()  # ends the first process there, and with it all others
        for process in (self._unshare, *self._started):
            process.wait(10)
        self._unshare.stdout.close()


class Network:
    """A sandbox with hosts; a context manager.

    Attributes:
        head: the machine at the bridge.
        hosts: the others, in their order.
    """

    def __init__(self, folder, names):
        self._folder = Path(folder)
        self._names = list(names)
        self.hosts = []

    def __getitem__(self, name):
        return next(host for host in self.hosts if host.name == name)

    def __enter__(self):
        hosts_file = self._folder / "hosts"
        lines = ["127.0.0.1 localhost", f"{_NETWORK}.254 head"]
        for number, name in enumerate(self._names, 1):
            lines.append(f"{_NETWORK}.{number} {name}")
            lines.append(f"{_NETWORK6}:{number:x} {name}-v6")
        hosts_file.write_text("\n".join(lines) + "\n")

        new = ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--kill-child=KILL"]
        new.append("--mount-proc")
        head_script = [_BEGIN + _BRIDGE + _READY, "head", hosts_file]
        self.head = Host("head", 254, [*new, "--ipc"], head_script)
        try:
            for number, name in enumerate(self._names, 1):
                script = [_BEGIN + _READY, name, hosts_file]
                host = Host(name, number, self.head.enter(new), script)
                self.hosts.append(host)
                host.connect(self.head)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host in self.hosts:
            host.end()
        self.head.end()

        def left():
            return [each.processes() for each in (self.head, *self.hosts) if each.processes()]

        assert wait_until(lambda: not left(), 5), f"left behind in the sandbox: {left()}"


def _descendants(pid):
    """A process and those below it, each the only child of the one before."""
    chain = [pid]
    while children := _children(chain[-1]):
        chain += children
    return chain


def _children(pid):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                if int(stat[1]) == pid:
                    found.append(int(entry.name))
    return found
