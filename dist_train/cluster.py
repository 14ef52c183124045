"""Cluster: which workers there are and which of them this process is, from the environment.

Pure: nothing here touches TensorFlow, the network or os.environ.
"""

import dataclasses
import json
import re
from collections.abc import Mapping

from dist_train.errors import UsageError

# A name or an IPv4 address, or an IPv6 address in brackets; a port without leading zeros.
_ADDRESS = re.compile(
    r"([\w-]{1,63}(\.[\w-]{1,63})*\.?|\[[0-9a-f:.]+(%[\w.-]+)?\]):([1-9][0-9]{0,4})",
    re.ASCII | re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run.

    Attributes:
      addresses: 'host:port' of each worker, in the order of their indices; the first is the
        chief's.
      index: which of them this process is.
    """

    addresses: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes the log, the checkpoints and the exports."""
        return self.index == 0

    def name(self, index: int) -> str:
        """How messages call a worker: 'worker 3 (n7:40123)'."""
        return f"worker {index} ({self.addresses[index]})"


def of_environment(environ: Mapping[str, str], strategy: str) -> Cluster | None:
    """The cluster that `environ` describes, or None for a run of one process.

    Args:
      environ: TF_CONFIG is read, in TensorFlow's format: {"cluster": {"worker": ["host:port", …],
        "chief": […]}, "task": {"type": "worker", "index": 0}}; a chief comes before the workers.
      strategy: the strategy that was asked for; it and the environment must fit.

    Raises:
      UsageError: TF_CONFIG is not usable, or it contradicts the strategy. Never a silent single
        worker: TensorFlow itself makes one of a TF_CONFIG without a cluster.
    """
    text = environ.get("TF_CONFIG", "")
    if strategy != "multi_worker":
        cluster = _parse(text) if text else None
        if cluster is not None and len(cluster.addresses) > 1:
            raise UsageError(
                f"TF_CONFIG names {len(cluster.addresses)} workers but strategy={strategy} trains"
                " in one process; use --strategy=multi_worker or unset TF_CONFIG"
            )
        return None
    if not text:
        raise UsageError(
            "strategy=multi_worker needs the workers' addresses in TF_CONFIG, which is not set;"
            " start it with dist-launch"
        )
    return _parse(text)


def is_evaluator(environ: Mapping[str, str]) -> bool:
    """Whether TF_CONFIG makes this process the evaluator, which is beside the cluster, not in it.

    Raises:
      UsageError: TF_CONFIG is no JSON object.
    """
    task = _object(environ["TF_CONFIG"]).get("task") if environ.get("TF_CONFIG") else None
    return isinstance(task, dict) and task.get("type") == "evaluator"


def _parse(text: str) -> Cluster:
    config = _object(text)
    jobs = config.get("cluster")
    if not isinstance(jobs, dict) or not jobs:
        raise _invalid("it has no 'cluster'", 'add {"worker": ["host:port", …]}')
    if unknown := set(jobs) - {"chief", "worker", "evaluator"}:
        raise _invalid(
            f"its cluster has {', '.join(map(repr, sorted(unknown)))}",
            "only 'chief' and 'worker' can train; parameter servers are not supported",
        )
    members = []  # (type, index within the type), in the order of the workers' indices
    addresses = []
    for job in ("chief", "worker"):
        hosts = jobs.get(job, [])
        if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
            raise _invalid(f"its {job!r} is not a list of addresses", 'use ["host:port", …]')
        members += [(job, index) for index in range(len(hosts))]
        addresses += hosts
    if not addresses:
        raise _invalid("its cluster has no worker", 'add {"worker": ["host:port", …]}')
    if len(jobs.get("chief", [])) > 1:
        raise _invalid(f"it names {len(jobs['chief'])} chiefs", "there is one at most")
    for address in addresses:
        match = _ADDRESS.fullmatch(address)
        if match is None or int(match[4]) > 65535:
            raise _invalid(
                f"{address!r} is no address", "use 'host:port' with a port of 1 to 65535"
            )
    for address in addresses:
        if addresses.count(address) > 1:
            raise _invalid(f"{address} stands for two workers", "give each its own port")
    return Cluster(tuple(addresses), _own_index(config.get("task"), members))


def _object(text: str) -> dict:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"TF_CONFIG is not JSON ({error}): {text[:80]!r}") from None
    if not isinstance(config, dict):
        raise _invalid("it is not a JSON object", 'use {"cluster": …, "task": …}')
    return config


def _own_index(task: object, members: list[tuple[str, int]]) -> int:
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        raise _invalid(
            "its 'task' does not say which worker this is",
            'add {"type": "worker", "index": 0}',
        )
    kind, index = task["type"], task["index"]
    if isinstance(index, str) and re.fullmatch("[0-9]{1,9}", index):  # some schedulers' way
        index = int(index)
    if kind not in ("chief", "worker"):
        raise _invalid(f"its task is {kind!r}", "only 'chief' and 'worker' can train")
    if type(index) is not int or (kind, index) not in members:
        count = sum(1 for job, _ in members if job == kind)
        if count == 0:
            raise _invalid(f"its task is {kind!r}", f"the cluster has no {kind!r}")
        raise _invalid(f"its task index is {index!r}", f"the cluster has {kind} 0 to {count - 1}")
    return members.index((kind, index))


def _invalid(what: str, remedy: str) -> UsageError:
    return UsageError(f"TF_CONFIG: {what}; {remedy}")
