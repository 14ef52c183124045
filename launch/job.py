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
class Host:
    """A machine: the address by which the others reach it, and how many workers it takes."""

    address: str
    slots: int


@dataclass(frozen=True)
class Job:
    """One start of a group.

    Attributes:
        command: the program and its arguments, the same for all.
        directory: where it runs.
        environ: the launcher's own environment; what the user has set there wins over our defaults.
        hosts: where the workers run, in the cluster's order.
        machine: what of this machine may be used.
        shares: how it is shared out.
        evaluator: whether there is one.
        slots: the numbers of the places in use, one for each worker; `(0, 2)`: 1 is left out.
        ports: a free port for each worker.
        restart: how often the group was restarted.
    """

    command: tuple[str, ...]
    directory: str
    environ: Mapping[str, str]
    hosts: tuple[Host, ...]
    machine: Machine
    shares: Shares
    evaluator: bool = False
    slots: tuple[int, ...] = ()
    ports: tuple[int, ...] = ()
    restart: int = 0

    @property
    def addresses(self) -> tuple[str, ...]:
        """The cluster: `host:port` of each worker.

        TensorFlow's server listens on all interfaces whatever the address says, so the ports of one
        host differ.
        """
        places = [host for host in self.hosts for _ in range(host.slots)]
        return tuple(
            f"{places[slot].address}:{port}"
            for slot, port in zip(self.slots, self.ports, strict=True)
        )


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
    """

    name: str
    slot: int | None
    command: tuple[str, ...]
    directory: str
    env: Mapping[str, str]
    place: Place

    def shell_line(self) -> str:
        """The same as a line to paste into a shell."""
        cpus = ",".join(map(str, self.place.cpus))
        bind = ["taskset", "-c", cpus] if cpus else []
        variables = [f"{name}={value}" for name, value in self.env.items()]
        line = shlex.join(["env", *variables, *bind, *self.command])
        return f"cd {shlex.quote(self.directory)} && {line}"


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
