"""An ssh server on each host of a test's network, and a client that may log in."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hosts

ROOT = Path(__file__).parents[2]

_SERVER = """\
ListenAddress {address}
{address6}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
UseDNS no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
AcceptEnv none
"""
# The path of a config file goes to ssh with -F, so that nothing of the user's own is read.
_CLIENT = """\
IdentityFile {folder}/user_key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
"""


def why_not():
    """Why there can be no ssh servers here; empty: there can."""
    for program in ("/usr/sbin/sshd", "ssh", "ssh-keygen"):
        if not shutil.which(program):
            return f"needs the program `{program}` (openssh-server)"
    return hosts.why_not()


def start(network, folder):
    """Starts a server on each host; they end with the network.

    Returns:
        The path of the client's configuration, for `ssh -F`.
    """
    folder = Path(folder)
    for name in ("host_key", "user_key"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / name]
        subprocess.run(key, check=True)
    host_key = (folder / "host_key.pub").read_text()
    known = [f"{h.name},{h.name}-v6,{h.address},{h.address6} {host_key}" for h in network.hosts]
    (folder / "known_hosts").write_text("".join(known))
    (folder / "ssh_config").write_text(_CLIENT.format(folder=folder))
    for host in network.hosts:
        config = folder / f"sshd_config_{host.name}"
        config.write_text(
            _SERVER.format(
                folder=folder,
                address=host.address,
                address6=f"ListenAddress {host.address6}" if host.has_address6() else "",
            )
        )
        host.run(["mkdir", "-p", "/run/sshd"])
        host.start(["/usr/sbin/sshd", "-D", "-e", "-f", config], stderr=subprocess.DEVNULL)
    for host in network.hosts:
        answers = ["ssh", "-F", folder / "ssh_config", host.name, "true"]
        assert hosts.wait_until(lambda c=answers: _succeeds(network.head, c)), f"{host.name}: sshd"
    return folder / "ssh_config"


def _succeeds(head, command):
    with head.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        return process.wait(10) == 0


class Cluster:
    """Three hosts with ssh servers, and a launcher at the head that may log in to them.

    Attributes:
        network: its machines.
        folder: where launchers run.
    """

    def __init__(self, network, config, folder):
        self.network = network
        self.folder = Path(folder)
        self.folder.mkdir()
        self.config = config
        self.processes = []

    def start(self, *arguments, **env):
        """Starts `dist-launch --backend=ssh ARGUMENTS`; its output goes to a file."""
        log = self.folder / f"launch-{len(self.processes)}.log"
        launch = [sys.executable, "-m", "launch"]
        launch += ["--backend=ssh", f"--ssh_options=-F {self.config}"]
        inherited = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        with log.open("wb") as file:
            process = self.network.head.start(
                [*launch, *arguments],
                cwd=self.folder,
                env={**inherited, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        process.log = log
        self.processes.append(process)
        return process

    def run(self, *arguments, timeout_s=60, **env):
        """Starts one and waits for it: its exit status and its output."""
        process = self.start(*arguments, **env)
        return process.wait(timeout_s), process.log.read_text()

    def alive(self):
        """Host -> the command lines of what runs there, the ssh server and its sessions aside."""
        machines = (self.network.head, *self.network.hosts)
        found = {m.name: [c for c in m.processes().values() if "sshd:" not in c] for m in machines}
        return {name: commands for name, commands in found.items() if commands}

    def end(self):
        """Kills launchers that still run, and returns what is left anywhere."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.inside, signal.SIGKILL)
                process.wait(10)
        for host in self.network.hosts:
            host.mend()
        hosts.wait_until(lambda: not self.alive(), 40)
        return self.alive()
