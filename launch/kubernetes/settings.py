"""What a user can ask of the Kubernetes backend, checked before anything is written.

The API server would refuse most of what is refused here too, but later, and some of it only as an
event of a pod that never starts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from launch.errors import UsageError

KINDS = ("job", "jobset", "trainjob", "tfjob")
PULL_POLICIES = ("Always", "IfNotPresent", "Never")
# What the generated documents use themselves.
RESERVED_PATHS = ("/tmp", "/dev/shm")
RESERVED_LABELS = ("app.kubernetes.io/instance", "app.kubernetes.io/managed-by")

# RFC 1035 and RFC 1123 as Kubernetes has them: lower case only.
_LABEL_1035 = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
_LABEL_1123 = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL_1123}(\.{_LABEL_1123})*"
_LABEL_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
# The grammar of image references of the OCI distribution: [host[:port]/]path[:tag][@digest].
_HOST = r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
_PATH = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
_IMAGE = (
    rf"({_HOST}(:[0-9]+)?/)?{_PATH}(/{_PATH})*(:[A-Za-z0-9_][\w.-]{{0,127}})?"
    r"(@[A-Za-z][A-Za-z0-9+._-]*:[0-9a-fA-F]{32,})?"
)
_CPU = r"[0-9]{1,6}(\.[0-9]{1,3})?|[0-9]{1,9}m"
_MEMORY = r"[0-9]{1,12}(\.[0-9]{1,3})?(Ki|Mi|Gi|Ti|k|M|G|T)"


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim, and where the workers find it."""

    claim: str
    path: str


@dataclass(frozen=True)
class Settings:
    """The wishes that the Kubernetes backend has beyond a `launch.job.Job`.

    Attributes:
        kind: one of KINDS.
        name: of all documents; a DNS-1035 label, since a Service has that name too.
        image: the container image.
        workers: how many pods.
        port: of each worker; a pod has an address of its own, so all have the same one.
        namespace: empty: the one of the user's context.
        token_secret: the Secret whose key `token` becomes DIST_TRAIN_TOKEN.
        volumes: claims that all workers mount.
        cpu, memory: of each worker, as Kubernetes quantities; empty: no request and no limit.
        gpus: of each worker; 0: none, even where the node shows some; None: none is asked for.
        labels: for all documents and pods.
        pull_policy: empty: what Kubernetes takes.
        pull_secrets: names of Secrets for a private registry.
        max_restarts: of the group, after failures.
        grace_period_s: from SIGTERM to SIGKILL.

    Raises:
        UsageError: one of them cannot be used; the text names the flag.
    """

    kind: str
    name: str
    image: str
    workers: int
    port: int = 2222
    namespace: str = ""
    token_secret: str = ""
    volumes: tuple[Volume, ...] = ()
    cpu: str = ""
    memory: str = ""
    gpus: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    pull_policy: str = ""
    pull_secrets: tuple[str, ...] = ()
    max_restarts: int = 0
    grace_period_s: int = 30

    def __post_init__(self) -> None:
        if not self.image:
            raise UsageError("--backend=kubernetes needs the workers' image: add --image=NAME:TAG")
        if len(self.image) > 500 or not re.fullmatch(_IMAGE, self.image, re.ASCII):
            raise UsageError(
                f"--image={self.image}: is no image reference; use [HOST/]NAME[:TAG][@DIGEST],"
                " the name in lower case"
            )
        self._check_names()
        self._check_resources()
        self._check_volumes()
        if not 1024 <= self.port <= 65535:
            raise UsageError(
                f"--port={self.port}: must be 1024 to 65535; the workers are not root, and those"
                " below belong to root"
            )
        if self.kind == "job" and self.max_restarts:
            raise UsageError(
                f"--max_restarts={self.max_restarts}: a Job replaces single pods, not the group;"
                " use --kubernetes_kind=jobset, or --max_restarts=0"
            )
        if self.kind == "tfjob" and self.workers == 1:
            raise UsageError(
                "--workers=1: the operator gives a TFJob of one worker no TF_CONFIG;"
                " use --kubernetes_kind=job"
            )

    def _check_names(self) -> None:
        if not re.fullmatch(_LABEL_1035, self.name):
            raise UsageError(
                f"--name={self.name}: must be 1 to 63 of a-z, 0-9 and -, start with a letter and"
                " not end with -"
            )
        longest = self.host_name(self.workers - 1)
        if self.kind != "tfjob":
            longest += "-abcde"  # the Job controller's random suffix
        if len(longest) > 63:
            raise UsageError(
                f"--name={self.name}: a pod would be called {longest}, which is {len(longest)}"
                f" characters and 63 are allowed; shorten it by {len(longest) - 63}"
            )
        if self.namespace and not re.fullmatch(_LABEL_1123, self.namespace):
            raise UsageError(
                f"--namespace={self.namespace}: must be 1 to 63 of a-z, 0-9 and -, and neither"
                " start nor end with -"
            )
        for flag, names in (
            ("token_secret", [self.token_secret] if self.token_secret else []),
            ("image_pull_secret", self.pull_secrets),
            ("volume", [volume.claim for volume in self.volumes]),
        ):
            for name in names:
                if len(name) > 253 or not re.fullmatch(_SUBDOMAIN, name):
                    raise UsageError(
                        f"--{flag}={name}: a name in Kubernetes is of a-z, 0-9, - and ., starts"
                        " and ends with one of a-z, 0-9"
                    )
        for key, value in self.labels.items():
            prefix, slash, name = key.rpartition("/")
            good_prefix = not slash or (len(prefix) <= 253 and re.fullmatch(_SUBDOMAIN, prefix))
            if (
                not (good_prefix and re.fullmatch(_LABEL_NAME, name))
                or (value and not re.fullmatch(_LABEL_NAME, value))
                or key in RESERVED_LABELS
            ):
                raise UsageError(
                    f"--label={key}={value}: must be [PREFIX/]NAME=VALUE, name and value up to 63"
                    f" of A-Z, a-z, 0-9, -, _ and ., and not {' or '.join(RESERVED_LABELS)}"
                )

    def _check_resources(self) -> None:
        if self.cpu and (not re.fullmatch(_CPU, self.cpu) or not float(self.cpu.rstrip("m"))):
            raise UsageError(
                f"--cpu={self.cpu}: must be a positive number of CPUs, as in 4, 0.5 or 500m"
            )
        if self.memory and (
            not re.fullmatch(_MEMORY, self.memory) or not float(self.memory.rstrip("KMGTik"))
        ):
            raise UsageError(
                f"--memory={self.memory}: must be positive and have a unit, as in 8Gi or 500Mi"
            )
        if self.pull_policy and self.pull_policy not in PULL_POLICIES:
            raise UsageError(
                f"--image_pull_policy={self.pull_policy}: must be {', '.join(PULL_POLICIES)}"
            )

    def _check_volumes(self) -> None:
        paths = [volume.path for volume in self.volumes]
        for volume in self.volumes:
            parts = volume.path.split("/")
            if not re.fullmatch(r"(/[^/:\0]+)+", volume.path) or {".", ".."} & set(parts):
                raise UsageError(
                    f"--volume={volume.claim}:{volume.path}: must be CLAIM:/PATH, an absolute path"
                    " below / without . or .."
                )
            if volume.path in RESERVED_PATHS or paths.count(volume.path) > 1:
                raise UsageError(
                    f"--volume={volume.claim}:{volume.path}: something else is mounted there;"
                    " use another path"
                )

    def host_name(self, index: int) -> str:
        """What the pod of a worker calls itself: the first label of its address."""
        if self.kind == "job":
            return f"{self.name}-{index}"
        if self.kind == "tfjob":
            return f"{self.name}-worker-{index}"
        # <JobSet>-<replicated job>-<its replica>-<pod>
        return f"{self.name}-{self.replicated_job}-0-{index}"

    @property
    def replicated_job(self) -> str:
        """The name of the one replicated job of a JobSet; the Trainer looks for `node`."""
        return "node" if self.kind == "trainjob" else "worker"

    @property
    def threads(self) -> int:
        """Intra-op threads that the CPUs are good for; 0: not known."""
        if not self.cpu:
            return 0
        cpus = float(self.cpu[:-1]) / 1000 if self.cpu.endswith("m") else float(self.cpu)
        return max(1, int(cpus))
