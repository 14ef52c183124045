"""A Slurm cluster on the hosts of a test's network: slurmctld at its head, slurmd on each host."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import hosts

ROOT = Path(__file__).parents[2]

# As little as works without systemd and cgroups. A requeued job waits for twice `cred_expire`.
_CONF = """\
ClusterName=test
SlurmctldHost=head
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PlugStackConfig=/dev/null
ReturnToService=2
KillWait=15
SchedulerParameters=sched_interval=2,bf_interval=1
NodeName={names} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not():
    """Why there can be no Slurm here; empty: there can."""
    for program in ("/usr/sbin/slurmctld", "/usr/sbin/slurmd", "sbatch", "/usr/sbin/munged"):
        if not shutil.which(program):
            return f"needs the program `{program}` (slurmctld, slurmd, slurm-client, munge)"
    return hosts.why_not()


class Slurm:
    """The cluster; it ends with the network, but better before it, by `end`."""

    def __init__(self, network, folder):
        self._network = network
        self._folder = folder
        names = ",".join(host.name for host in network.hosts)
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, names=names))
        (folder / "state").mkdir()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "SLURM_"))}
        self.environ = {
            **inherited,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_NUM_INTRAOP_THREADS": "1",
        }
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # Its socket is a file, which the hosts share: one serves all.
        self._start(
            network.head,
            [
                *("/usr/sbin/munged", "--foreground", "--force", f"--key-file={key}"),
                *(f"--{kind}-file={folder}/munge.{kind}" for kind in ("log", "pid", "seed")),
                f"--socket={folder}/munge.socket",
            ],
        )
        assert hosts.wait_until((folder / "munge.socket").exists), "munged does not start"
        self._controller = self._start(network.head, ["/usr/sbin/slurmctld", "-D", "-c"])
        for host in network.hosts:
            self._start(host, ["/usr/sbin/slurmd", "-D", "-c", "-N", host.name])
        count = len(network.hosts)
        assert hosts.wait_until(lambda: self._idle() == count, 30), self.logs()

    def _start(self, host, command):
        with open(self._folder / "daemons.log", "ab") as log:
            return host.start(command, env=self.environ, stdout=log, stderr=log)

    def _idle(self):
        try:
            return self.run(["sinfo", "-h", "-N", "-t", "idle"]).count("idle")
        except AssertionError:  # slurmctld does not answer yet
            return 0

    def start(self, command, **options):
        """Starts a command at the head, as a user of the cluster would; options go to Popen."""
        environ = {**self.environ, **options.pop("env", {})}
        return self._network.head.start(command, env=environ, **options)

    def run(self, command, **options):
        """Runs such a command to its end and returns what it writes."""
        environ = {**self.environ, **options.pop("env", {})}
        return self._network.head.run(command, env=environ, **options)

    def state(self, job):
        """What scontrol says of a job: {"JobState": "RUNNING", "Restarts": "0", …}."""
        words = self.run(["scontrol", "-o", "show", "job", str(job)]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def tasks(self):
        """Process id (as seen by the tests) -> command of what runs on the nodes for jobs."""
        found = {}
        for host in self._network.hosts:
            for pid, command in host.processes().items():
                if not command.startswith("/usr/sbin/slurmd "):
                    found[pid] = command
        return found

    def trainers(self, name):
        """Process ids (as seen by the tests) of the trainers on a node."""
        processes = self._network[name].processes()
        python = [pid for pid, text in processes.items() if re.match(r"\S+ -m dist_train ", text)]
        return sorted(python)

    def logs(self):
        """What the daemons say, for the message of a test that fails."""
        return "\n".join(f"{p.name}:\n{p.read_text()}" for p in self._folder.glob("*.log"))

    def end(self):
        """Ends the controller, and then the others with the network: no job is left to requeue."""
        os.kill(self._controller.inside, signal.SIGTERM)
        self._controller.wait(20)


def wait(holds, timeout_s):
    """Looks twice a second, so that looking takes nothing from what is waited for."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
