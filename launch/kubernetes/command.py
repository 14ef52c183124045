"""From the flags to the text on stdout."""

import math
import sys
from collections.abc import Sequence

from launch import options as common
from launch.errors import UsageError
from launch.kubernetes import documents, manifest, notes, options, pod
from launch.kubernetes.settings import Settings, Volume

# The Trainer's bound for a TrainJob's command.
_MAX_ARGUMENTS = 128


def run(command: Sequence[str]) -> None:
    """Prints the manifest for a command; the flags say the rest.

    Raises:
        UsageError: a flag does not fit; the text says which one and why.
    """
    settings = _settings()
    _check_command(command, settings)
    threads = common.THREADS.value
    job = pod.job(tuple(command), settings, 0 if threads == "auto" else int(threads))
    text = manifest.text(documents.plan(job, settings), notes.lines(settings, command))
    sys.stdout.buffer.write(text.encode())  # whatever the locale: the API server wants UTF-8


def _settings() -> Settings:
    gpus = common.GPUS_PER_WORKER.value
    secret = options.TOKEN_SECRET.value
    return Settings(
        kind=options.KIND.value,
        name=options.NAME.value,
        image=options.IMAGE.value,
        workers=common.fixed_workers(
            "nothing in Kubernetes starts the group again with fewer workers"
        ),
        port=options.PORT.value,
        namespace=options.NAMESPACE.value,
        token_secret=f"{options.NAME.value}-token" if secret is None else secret,
        volumes=tuple(_volume(text) for text in options.VOLUME.value),
        cpu=options.CPU.value,
        memory=options.MEMORY.value,
        gpus=None if gpus == "auto" else int(gpus),
        labels=dict(_label(text) for text in options.LABEL.value),
        pull_policy=options.IMAGE_PULL_POLICY.value,
        pull_secrets=tuple(options.IMAGE_PULL_SECRET.value),
        max_restarts=common.MAX_RESTARTS.value,
        grace_period_s=_grace_period_s(),
    )


def _grace_period_s() -> int:
    grace_period_s = common.GRACE_PERIOD_S.value
    if not math.isfinite(grace_period_s):
        raise UsageError(
            f"--grace_period_s={grace_period_s}: a pod has a number of whole seconds; use 86400 for"
            " a day"
        )
    return math.ceil(grace_period_s)


def _volume(text: str) -> Volume:
    claim, _, path = text.partition(":")
    return Volume(claim, path)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--label={text}: has no value; use NAME=VALUE")
    return key, value


def _check_command(command: Sequence[str], settings: Settings) -> None:
    for argument in command:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"the argument {argument!a} is not UTF-8, which a manifest has to be; rename it"
            ) from None
    if settings.kind == "trainjob" and len(command) > _MAX_ARGUMENTS:
        raise UsageError(
            f"the command has {len(command)} words and a TrainJob takes {_MAX_ARGUMENTS};"
            " use --kubernetes_kind=jobset, or --flagfile"
        )
