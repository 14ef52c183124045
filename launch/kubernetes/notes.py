"""What the user has to know and do besides: the comments above the documents."""

from collections.abc import Sequence

from launch.kubernetes.settings import Settings

_TITLES = {
    "job": "an Indexed Job (Kubernetes 1.29 or later)",
    "jobset": "a JobSet (JobSet 0.6 or later)",
    "trainjob": "a TrainJob and its TrainingRuntime (Kubeflow Trainer 2)",
    "tfjob": "a TFJob (Kubeflow Training Operator 1)",
}
_ENDS = {
    "job": [
        "A worker that was stopped on request (exit status 75 or 143) or evicted is replaced, and",
        "so are its peers, which stop with it. Any other end fails the Job for good, a lost node's",
        "too: a Job cannot start all workers again. Use --kubernetes_kind=jobset for that.",
    ],
    "jobset": [
        "A worker that was stopped on request (exit status 75 or 143) or evicted makes all start",
        "again, without limit; any other end does so {restarts}.",
    ],
    "tfjob": [
        "The operator cannot tell a stop on request (exit status 75) from a failure: any end but 0",
        "{restarts}.",
    ],
}
_ENDS["trainjob"] = _ENDS["jobset"]


def lines(settings: Settings, command: Sequence[str]) -> list[str]:
    """Comments of one line each.

    Args:
        settings: what the documents were made from.
        command: of the workers.
    """
    namespace = f" --namespace={settings.namespace}" if settings.namespace else ""
    count = "1 worker" if settings.workers == 1 else f"{settings.workers} workers"
    text = [f"{count} as {_TITLES[settings.kind]}.", ""]
    if settings.token_secret:
        text += [
            "First, once, the token that the workers prove to one another:",
            "  head -c 24 /dev/urandom | base64 | kubectl create secret generic"
            f" {settings.token_secret} --from-file=token=/dev/stdin{namespace}",
        ]
    text += [
        "Start:   kubectl apply -f FILE",
        f"Follow:  kubectl logs --follow --prefix --max-log-requests={settings.workers}"
        f" --selector=app.kubernetes.io/instance={settings.name}{namespace}",
        "End:     kubectl delete -f FILE",
        "",
        *(line.format(restarts=_restarts(settings)) for line in _ENDS[settings.kind]),
        "The NetworkPolicy holds where the cluster's network enforces it.",
    ]
    if not settings.volumes:
        text.append("Without --volume a --workdir has to be below /tmp, and ends with its pod.")
    elif settings.workers > 1:
        text.append("The claims have to allow ReadWriteMany, unless all pods are on one node.")
    if not any(argument.lstrip("-").startswith("start_timeout_s") for argument in command):
        text += [
            "dist-train's workers wait 120 s for one another: raise its --start_timeout_s where",
            "nodes have to come up or images have to be pulled.",
        ]
    return text


def _restarts(settings: Settings) -> str:
    restarts = settings.max_restarts
    if settings.kind == "tfjob":
        if not restarts:
            return "fails the TFJob (--max_restarts=0)"
        return f"restarts a worker in its pod, up to {_times(restarts)} each"
    if not restarts:
        return "never (--max_restarts=0)"
    return f"up to {_times(restarts)}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
