"""The pod that all workers are copies of."""

from collections.abc import Mapping
from typing import Any

from launch.binding import Place, Shares
from launch.job import Host, Job, environment
from launch.kubernetes.settings import Settings

# Any number but 0 would do; the image of --print_dockerfile has this one too.
USER = 1000
_INDEX = "TASK_INDEX"
_COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_REPLICA_INDEX = "metadata.labels['training.kubeflow.org/replica-index']"
_RESTART_ATTEMPT = "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
_CONTAINERS = {"job": "worker", "jobset": "worker", "trainjob": "node", "tfjob": "tensorflow"}


def job(command: tuple[str, ...], settings: Settings, threads: int = 0) -> Job:
    """The group as the other backends have it: one worker a host, in the order of the indices.

    Args:
        command: the program and its arguments.
        settings: which pods there are.
        threads: intra-op threads; 0: as many as --cpu gives.
    """
    # A TFJob's Services are named like its pods; the namespace need not be known.
    domain = "svc" if settings.kind == "tfjob" else settings.name
    indices = range(settings.workers)
    return Job(
        command=command,
        directory="",
        environ={},  # the user's own stays here: the image has its own
        hosts=tuple(Host(f"{settings.host_name(index)}.{domain}", 1) for index in indices),
        shares=Shares(bind=False, threads=threads),
        slots=tuple(indices),
        ports=(settings.port,) * settings.workers,
    )


def labels(settings: Settings) -> dict[str, str]:
    """What every document carries: the user's labels, and the two that `selector` looks for."""
    return {**settings.labels, **selector(settings)}


def selector(settings: Settings) -> dict[str, str]:
    """The labels that exactly this group's pods have."""
    return {
        "app.kubernetes.io/instance": settings.name,
        "app.kubernetes.io/managed-by": "dist-launch",
    }


def template(job: Job, settings: Settings) -> dict[str, Any]:
    """A PodTemplateSpec that is the same for all workers; each learns its index at its start.

    The workers are not root, hold no capability and no token of the API server, and can write to
    their volumes and to /tmp only: the Pod Security Standard `restricted`, and a little more.
    """
    mounts = {"tmp": "/tmp"}
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    if (
        settings.gpus or 0
    ) > 1:  # NCCL moves data between the GPUs of a host there; the default is 64 MiB
        mounts["shm"] = "/dev/shm"
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    for number, volume in enumerate(settings.volumes):
        mounts[f"claim-{number}"] = volume.path
        claim = {"claimName": volume.claim}
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": claim})

    container: dict[str, Any] = {
        "name": _CONTAINERS[settings.kind],
        "image": settings.image,
        **({} if settings.kind == "trainjob" else {"command": command(job)}),  # it has it itself
        "env": _env(job, settings),
        # A TFJob's operator looks for a port of this name.
        "ports": [
            {
                "name": "tfjob-port" if settings.kind == "tfjob" else "tensorflow",
                "containerPort": settings.port,
            }
        ],
        "resources": _resources(settings),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
    }
    if settings.pull_policy:
        container["imagePullPolicy"] = settings.pull_policy
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": settings.grace_period_s,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,  # so that it may write to the claims
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if settings.kind != "tfjob":  # its operator takes it from the replica's specification
        spec = {"restartPolicy": "Never", **spec}
    if settings.kind == "job":  # makes <host name>.<Service> resolve; JobSets see to it themselves
        spec = {"subdomain": settings.name, **spec}
    if settings.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.pull_secrets]
    return {"metadata": {"labels": labels(settings)}, "spec": spec}


def command(job: Job) -> list[str]:
    """The command, so written that the kubelet hands it over as it is.

    It would expand `$(NAME)`, and takes `$$` for one `$`.
    """
    return [argument.replace("$", "$$") for argument in job.command]


def _env(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The variables of `launch.job`, except for those that only a running launcher could know.

    The kubelet puts the value of a variable that stands before it in the place of `$(NAME)`.
    """
    # The GPUs that a pod asks for are the device plugin's to show.
    gpus = () if settings.gpus == 0 else None
    place = Place(threads=job.shares.threads or settings.threads, gpus=gpus)
    variables = environment(job, role="worker", index=f"$({_INDEX})", local_index=0, place=place)
    del variables["DIST_LAUNCH_RESTART"]
    index = _COMPLETION_INDEX
    if settings.kind == "tfjob":
        index = _REPLICA_INDEX
        del variables["TF_CONFIG"]  # the operator writes it
        # By suffix: the operator's addresses have the namespace in them.
        variables |= {"no_proxy": ".svc", "NO_PROXY": ".svc"}
    env = [_from_field(_INDEX, index)]
    if settings.kind in ("jobset", "trainjob"):
        env.append(_from_field("DIST_LAUNCH_RESTART", _RESTART_ATTEMPT))
    if settings.token_secret:
        reference = {"name": settings.token_secret, "key": "token"}
        env.append({"name": "DIST_TRAIN_TOKEN", "valueFrom": {"secretKeyRef": reference}})
    # The user of the image may have no home, or one that cannot be written.
    variables |= {"HOME": "/tmp"}
    return env + [{"name": name, "value": value} for name, value in variables.items()]


def _from_field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _resources(settings: Settings) -> Mapping[str, Any]:
    """Requests equal to limits: a worker that is throttled or evicted first holds up all others."""
    amounts = {"cpu": settings.cpu, "memory": settings.memory}
    resources = {name: amount for name, amount in amounts.items() if amount}
    if settings.gpus:
        resources["nvidia.com/gpu"] = str(settings.gpus)
    return {"requests": resources, "limits": resources} if resources else {}
