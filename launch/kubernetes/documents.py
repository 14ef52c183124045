"""The documents of a group, for each kind of workload.

What becomes of a worker that ends differs between the kinds:

    job       75, 143 and evictions: the pod is replaced, and dist-train's other workers, which
              have left with 75 too, are replaced with it. Anything else fails the Job at once: a
              Job replaces single pods, while tf.distribute needs the whole group to start again.
    jobset    75, 143 and evictions: the group is started again, without limit. Anything else: the
              group is started again up to --max_restarts times.
    trainjob  the same; the Trainer makes a JobSet of it.
    tfjob     The operator cannot tell 75 from a failure. Any end but 0 fails the TFJob, or with
              --max_restarts restarts the container in its pod, so many times for each worker.
"""

from typing import Any

from launch.job import Job
from launch.kubernetes import pod
from launch.kubernetes.settings import Settings

# Saved and stopped on request; and stopped by SIGTERM before there was anything to save.
_ON_REQUEST = [75, 143]


def plan(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The documents in the order in which they have to be created.

    Args:
        job: from `pod.job`.
        settings: what else is asked for.
    """
    workload = {"job": _job, "jobset": _jobset, "trainjob": _trainjob, "tfjob": _tfjob}
    return [_network_policy(settings), *workload[settings.kind](job, settings)]


def _document(api: str, kind: str, settings: Settings, spec: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": settings.name}
    if settings.namespace:
        metadata["namespace"] = settings.namespace
    metadata["labels"] = pod.labels(settings)
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}


def _network_policy(settings: Settings) -> dict[str, Any]:
    """TensorFlow's servers run what anybody sends them, so nobody but their peers may.

    All ports are open between peers: NCCL takes any.
    """
    peers = {"podSelector": {"matchLabels": pod.selector(settings)}}
    spec = {**peers, "policyTypes": ["Ingress"], "ingress": [{"from": [peers]}]}
    return _document("networking.k8s.io/v1", "NetworkPolicy", settings, spec)


def _job(job: Job, settings: Settings) -> list[dict[str, Any]]:
    service = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # workers look for one another before they are ready
        "selector": pod.selector(settings),
        "ports": [{"name": "tensorflow", "port": settings.port}],
    }
    return [
        _document("v1", "Service", settings, service),
        _document("batch/v1", "Job", settings, _job_spec(job, settings, on_request="Ignore")),
    ]


def _jobset(job: Job, settings: Settings) -> list[dict[str, Any]]:
    spec = _jobset_spec(job, settings)
    return [_document("jobset.x-k8s.io/v1alpha2", "JobSet", settings, spec)]


def _trainjob(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """A TrainJob, and a runtime of its own: the addresses in TF_CONFIG have the job's name."""
    api = "trainer.kubeflow.org/v1alpha1"
    runtime = {
        "mlPolicy": {"numNodes": settings.workers},
        "template": {"spec": _jobset_spec(job, settings)},
    }
    trainjob = {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "TrainingRuntime",
            "name": settings.name,
        },
        "trainer": {
            "numNodes": settings.workers,
            "image": settings.image,
            "command": pod.command(job),
        },
    }
    return [
        _document(api, "TrainingRuntime", settings, runtime),
        _document(api, "TrainJob", settings, trainjob),
    ]


def _tfjob(job: Job, settings: Settings) -> list[dict[str, Any]]:
    restarts = settings.max_restarts
    run_policy: dict[str, Any] = {"cleanPodPolicy": "Running"}
    if restarts:
        # It counts all workers' restarts together, and gives up when the sum is reached.
        run_policy["backoffLimit"] = restarts * settings.workers + 1
    spec = {
        "runPolicy": run_policy,
        "successPolicy": "AllWorkers",
        "tfReplicaSpecs": {
            "Worker": {
                "replicas": settings.workers,
                "restartPolicy": "OnFailure" if restarts else "Never",
                "template": pod.template(job, settings),
            }
        },
    }
    return [_document("kubeflow.org/v1", "TFJob", settings, spec)]


def _job_spec(job: Job, settings: Settings, on_request: str) -> dict[str, Any]:
    """A JobSpec.

    Args:
        on_request: what becomes of the Job when a pod was stopped on request: `Ignore` replaces
            the pod, `FailJob` fails the Job for a reason of its own.
    """
    return {
        "completionMode": "Indexed",
        "completions": settings.workers,
        "parallelism": settings.workers,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": on_request,
                    "onExitCodes": {"operator": "In", "values": list(_ON_REQUEST)},
                },
                {
                    "action": on_request,
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": pod.template(job, settings),
    }


def _jobset_spec(job: Job, settings: Settings) -> dict[str, Any]:
    """A JobSetSpec: the group starts again as a whole."""
    template: dict[str, Any] = {"spec": _job_spec(job, settings, on_request="FailJob")}
    if settings.kind == "trainjob":
        ancestor = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        template = {"metadata": {"labels": ancestor}, **template}
    return {
        "network": {
            "enableDNSHostnames": True,
            "publishNotReadyAddresses": True,
            "subdomain": settings.name,
        },
        "failurePolicy": {
            "maxRestarts": settings.max_restarts,
            "rules": [
                {
                    "name": "stoppedOnRequest",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
        "replicatedJobs": [{"name": settings.replicated_job, "replicas": 1, "template": template}],
    }
