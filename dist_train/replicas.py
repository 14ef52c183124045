"""Replicas: which devices train, and the tf.distribute strategy over them."""

import contextlib
import dataclasses
import math
import os
import platform

import tensorflow as tf

from dist_train import cores
from dist_train.cluster import Cluster
from dist_train.errors import RunError, UsageError

_KEYS_PER_STRATEGY = 100_000


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """What one process uses: `count` devices of `kind` ('GPU' or 'CPU')."""

    kind: str
    count: int

    @property
    def names(self) -> list[str]:
        """['GPU:0', 'GPU:1', …]"""
        return [f"{self.kind}:{index}" for index in range(self.count)]


def plan(strategy: str, devices: int, gpus: int) -> DevicePlan:
    """Chooses the devices of this process.

    Args:
      strategy: default, mirrored or multi_worker.
      devices: replicas asked for; 0: all visible GPUs, or one CPU.
      gpus: how many GPUs are visible.

    Raises:
      UsageError: more was asked for than there is.
    """
    if gpus:
        if devices > gpus:
            raise UsageError(
                f"devices={devices} but {gpus} GPUs are visible; use --devices={gpus} or less"
            )
        return DevicePlan("GPU", 1 if strategy == "default" else devices or gpus)
    if strategy == "multi_worker" and devices > 1:
        raise UsageError(
            f"devices={devices}: without GPUs a worker of multi_worker has one replica; start"
            f" {devices} times as many workers instead"
        )
    return DevicePlan("CPU", devices or 1)


def own_part(gpus: list, part: int, parts: int) -> list:
    """The `part`-th of `parts` equal parts of the GPUs that the workers of a host all see.

    Raises:
      UsageError: they cannot be divided; TensorFlow takes a GPU's whole memory, so none is shared.
    """
    each, left = divmod(len(gpus), parts)
    if left:
        raise UsageError(
            f"{parts} workers of this host see the same {len(gpus)} GPUs, which cannot be divided"
            f" equally; start {math.gcd(parts, len(gpus))} workers a host, or let the scheduler"
            " give each its own (--gpus-per-task, CUDA_VISIBLE_DEVICES; -1: train on the CPU)"
        )
    return gpus[each * part : each * (part + 1)]


def create(strategy: str, devices: int, cluster: Cluster | None) -> tf.distribute.Strategy:
    """The strategy, its devices set up; must come before any other TensorFlow operation.

    Raises:
      UsageError: the devices do not exist, or TensorFlow already runs with others.
      RunError: the other workers could not be reached.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if cluster is not None:
        gpus = own_part(gpus, *cluster.gpu_part)
    chosen = plan(strategy, devices, len(gpus))
    _limit_threads()
    if chosen.kind == "GPU":
        _use_gpus(gpus[: chosen.count])
    else:
        _split_cpu(chosen.count)
    if strategy == "mirrored":
        # Strategies of one process number their collectives from the same start, and TensorFlow
        # takes those of two with different devices for one and the same group.
        tf.distribute.MirroredStrategy._collective_key_base += _KEYS_PER_STRATEGY
        return tf.distribute.MirroredStrategy(chosen.names)
    if strategy == "multi_worker":
        assert cluster is not None
        return _multi_worker(cluster)
    return tf.distribute.get_strategy()


def _limit_threads() -> None:
    """As many threads as there is time for, unless the user has said how many."""
    told = tf.config.threading.get_intra_op_parallelism_threads()
    if cores.granted() < cores.seen() and not told and "TF_NUM_INTRAOP_THREADS" not in os.environ:
        with contextlib.suppress(RuntimeError):  # TensorFlow is up already, with its own number
            tf.config.threading.set_intra_op_parallelism_threads(cores.granted())


def _use_gpus(gpus: list) -> None:
    try:
        tf.config.set_visible_devices(gpus, "GPU")
        for gpu in gpus:
            # TensorFlow would take all memory of the GPU, also from the process beside it.
            tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError as error:  # TensorFlow is up already: the second run of this process
        if tf.config.get_visible_devices("GPU") != gpus:
            raise UsageError(
                f"TensorFlow already runs with other GPUs ({error}); use a new process"
            ) from error


def _split_cpu(count: int) -> None:
    if count == 1:
        return
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * count
    try:
        tf.config.set_logical_device_configuration(cpu, logical)
    except RuntimeError as error:
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise UsageError(
                f"devices={count}: TensorFlow already runs with fewer logical CPU devices;"
                " use a new process, or begin with the run that has the most"
            ) from error


def _multi_worker(cluster: Cluster) -> tf.distribute.Strategy:
    # gRPC would ask the proxy for the peers.
    hosts = dict.fromkeys(address.rpartition(":")[0] for address in cluster.addresses)
    for name in ("no_proxy", "NO_PROXY"):
        known = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join(dict.fromkeys([*known, *hosts]))
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.addresses)}),
        task_type="worker",
        task_id=cluster.index,
        rpc_layer="grpc",
    )
    try:
        # The collectives are left to TensorFlow's choice: NCCL between GPUs, a ring between CPUs.
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    except RuntimeError as error:
        raise UsageError(
            f"strategy=multi_worker must be the first that TensorFlow does in a process ({error})"
        ) from error
    except tf.errors.OpError as error:
        first = str(error.message).splitlines()[0]
        raise RunError(
            f"{cluster.name(cluster.index)} could not start with its peers: {first}"
        ) from error


def describe(local_replicas: int) -> str:
    """The devices of this process, '2 CPU devices on an AMD EPYC, 2 cores' say."""
    if gpus := tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpus[0])
        kind, where = "GPU", details.get("device_name", "unknown model")
    else:
        seen, granted = cores.seen(), cores.granted()
        held = f"time for {granted} of " if granted < seen else ""
        kind, where = "CPU", f"{_processor()}, {held}{seen} cores"
    return f"{local_replicas} {kind} device{'' if local_replicas == 1 else 's'} ({where})"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
