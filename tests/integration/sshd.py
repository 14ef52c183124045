"""An ssh server on each host of a test's network, and a client that may log in."""

import shutil
import subprocess
from pathlib import Path

import hosts

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
