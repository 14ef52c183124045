"""What is to run: pure data, and the environment that tells a worker who it is.

Every worker gets

    TF_CONFIG                {"cluster": {"worker": ["127.0.0.1:40123", ...]},
                              "task": {"type": "worker", "index": 1}}
    DIST_LAUNCH_ROLE         worker or evaluator
    DIST_LAUNCH_INDEX        0 .. workers - 1; worker 0 is the chief
    DIST_LAUNCH_WORKERS      how many workers there are
    DIST_LAUNCH_LOCAL_INDEX  its place on its host, which it keeps when a neighbour is left out
    DIST_LAUNCH_RESTART      how often the group was restarted
    DIST_LAUNCH_HEARTBEAT    a file that it may rewrite or touch in each loop (launch.heartbeat);
                             content: the step number
    no_proxy, NO_PROXY       extended by the cluster's addresses: gRPC would ask the proxy for them
    CUDA_VISIBLE_DEVICES     its GPUs, where there are any

and, unless the user has set them (and --threads does not say more), OMP_NUM_THREADS,
TF_NUM_INTRAOP_THREADS, TF_NUM_INTEROP_THREADS and PYTHONUNBUFFERED.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from launch.binding import Machine, Place, Shares

INTRAOP = "TF_NUM_INTRAOP_THREADS"


@dataclass(frozen=True)
class Login:
    """How to start something on another machine.

    Attributes:
        ssh: the ssh client and its arguments, up to the host.
        python: the interpreter there that runs our agent.
        link_timeout_s: how long either side hears nothing of the other before it gives it up.
    """

    ssh: tuple[str, ...]
    python: str = "python3"
    link_timeout_s: float = 15.0


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        address: by which the others reach it; an IPv6 address is in brackets.
        slots: how many workers it takes.
        machine: what of it may be used; None: not known yet.
        login: None: it is the launcher's own.
    """

    address: str
    slots: int
    machine: Machine | None = None
    login: Login | None = None


@dataclass(frozen=True)
class Job:
    """One start of a group.

    Attributes:
        command: the program and its arguments, the same for all.
        directory: where it runs.
        environ: the environment that goes with it, from the launcher's own; what the user has set
            there wins over our defaults.
        hosts: where the workers run, in the cluster's order; their slots are numbered throughout.
        shares: how a host is shared out.
        evaluator: whether there is one.
        slots: the numbers of the places in use, one for each worker; `(0, 2)`: 1 is left out.
        ports: a free port for each worker.
        release_ports: nobody keeps these ports for the workers (see `launch.ports`).
        restart: how often the group was restarted.
        former: addresses of the starts before. They are not used again: a worker of then that is
            not dead yet, on a host that is cut off, must not meet those of now.
    """

    command: tuple[str, ...]
    directory: str
    environ: Mapping[str, str]
    hosts: tuple[Host, ...]
    shares: Shares
    evaluator: bool = False
    slots: tuple[int, ...] = ()
    ports: tuple[int, ...] = ()
    release_ports: bool = False
    restart: int = 0
    former: tuple[str, ...] = ()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The cluster: `host:port` of each worker.

        TensorFlow's server listens on all interfaces whatever the address says, so the ports of one
        host differ.
        """
        return tuple(
            f"{self.host_of(slot).address}:{port}"
            for slot, port in zip(self.slots, self.ports, strict=True)
        )

    def former_ports(self, host: Host) -> list[int]:
        """The ports that the workers of a host had at the starts before."""
        parts = [address.rpartition(":") for address in self.former]
        return [int(port) for name, _, port in parts if name == host.address]

    def host_of(self, slot: int) -> Host:
        """The host that a place is on."""
        return [host for host in self.hosts for _ in range(host.slots)][slot]


@dataclass(frozen=True)
class Task:
    """One process to start.

    Attributes:
        name: `worker 1` or `evaluator`.
        slot: its place's number; None for the evaluator.
        command: the program and its arguments.
        directory: where it runs.
        env: the variables to set on top of the launcher's own.
        place: what of its host it may use.
        host: where it runs.
        held_port: a port that is kept there until it listens on it; 0: none.
    """

    name: str
    slot: int | None
    command: tuple[str, ...]
    directory: str
    env: Mapping[str, str]
    place: Place
    host: Host
    held_port: int = 0

    @property
    def remote_address(self) -> str:
        """Its host, if that is another machine; else empty."""
        return self.host.address if self.host.login else ""

    def shell_line(self, carried: Mapping[str, str] | None = None) -> str:
        """The same as a line to paste into a shell.

        Args:
            carried: variables that another machine does not have by itself.
        """
        cpus = ",".join(map(str, self.place.cpus))
        bind = ["taskset", "-c", cpus] if cpus else []
        variables = [f"{name}={value}" for name, value in {**(carried or {}), **self.env}.items()]
        line = shlex.join(["env", *variables, *bind, *self.command])
        line = f"cd {shlex.quote(self.directory)} && {line}"
        return shlex.join([*self.host.login.ssh, line]) if self.host.login else line


def environment(
    job: Job, *, role: str, index: int | str, local_index: int, place: Place
) -> dict[str, str]:
    """The variables that a process is given on top of `job.environ`.

    Args:
        job: the start that it belongs to.
        role: `worker` or `evaluator`. The evaluator stands outside the cluster, as TensorFlow
            documents it.
        index: its number among its like; text where a scheduler fills it in later.
        local_index: its number on its host.
        place: what of its host it may use.
    """
    cluster = json.dumps({"worker": list(job.addresses)})
    env = {
        "TF_CONFIG": f'{{"cluster": {cluster}, "task": {{"type": "{role}", "index": {index}}}}}',
        "DIST_LAUNCH_ROLE": role,
        "DIST_LAUNCH_INDEX": str(index),
        "DIST_LAUNCH_WORKERS": str(len(job.slots)),
        "DIST_LAUNCH_LOCAL_INDEX": str(local_index),
        "DIST_LAUNCH_RESTART": str(job.restart),
    }
    for name in ("no_proxy", "NO_PROXY"):
        known = [entry for entry in job.environ.get(name, "").split(",") if entry]
        hosts = [address.rpartition(":")[0] for address in job.addresses]
        env[name] = ",".join(dict.fromkeys([*known, *hosts]))
    if place.gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus) or "-1"
    defaults = {"PYTHONUNBUFFERED": "1"}  # else the last lines of a killed worker die with it
    threads = {}
    if place.threads:
        threads = dict.fromkeys(("OMP_NUM_THREADS", INTRAOP), str(place.threads))
    if place.threads == 1:
        threads["TF_NUM_INTEROP_THREADS"] = "1"
    if job.shares.threads:  # the user has asked for them, and not only long ago in a profile
        env |= threads
    else:
        defaults |= threads
    return env | {name: value for name, value in defaults.items() if name not in job.environ}
