"""TF_CONFIG: the cluster as TensorFlow documents it, and as any launcher can say it.

{"cluster": {"worker": ["host:port", …], "chief": […]}, "task": {"type": "worker", "index": 0}}
"""

import json
import re
from collections.abc import Mapping

from dist_train.cluster import Cluster
from dist_train.errors import UsageError

# A name or an IPv4 address, or an IPv6 address in brackets; a port without leading zeros.
_ADDRESS = re.compile(
    r"([\w-]{1,63}(\.[\w-]{1,63})*\.?|\[[0-9a-f:.]+(%[\w.-]+)?\]):([1-9][0-9]{0,4})",
    re.ASCII | re.IGNORECASE,
)


NAME = "TF_CONFIG"
ALONE = "unset TF_CONFIG"


def size(environ: Mapping[str, str]) -> int:
    """How many workers TF_CONFIG names; 0: it is not set.

    Raises:
      UsageError: TF_CONFIG is not usable.
    """
    text = environ.get("TF_CONFIG", "")
    return len(_parse(text).addresses) if text else 0


def cluster(environ: Mapping[str, str], timeout_s: float) -> Cluster:
    """The workers that TF_CONFIG names, a chief before the others.

    Raises:
      UsageError: TF_CONFIG is not usable. Never a silent single worker: TensorFlow itself makes one
        of a TF_CONFIG without a cluster.
    """
    del timeout_s
    return _parse(environ["TF_CONFIG"])


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
