"""The flags of the Kubernetes backend."""

from absl import flags

from launch.kubernetes import settings
from launch.options import FLAGS

IMAGE = flags.DEFINE_string(
    "image", "", "The container image of the workers; see --print_dockerfile.", flag_values=FLAGS
)
KIND = flags.DEFINE_enum(
    "kubernetes_kind",
    "job",
    settings.KINDS,
    "job: needs nothing but Kubernetes, replaces workers that were stopped on request; jobset:"
    " restarts the group (JobSet 0.6 or later); trainjob, tfjob: Kubeflow Trainer 2, Training"
    " Operator 1.",
    flag_values=FLAGS,
)
NAME = flags.DEFINE_string(
    "name", "dist-train", "Name of the documents and pods.", flag_values=FLAGS
)
NAMESPACE = flags.DEFINE_string(
    "namespace",
    "",
    "Namespace of the documents. Default: that of kubectl's context.",
    flag_values=FLAGS,
)
PORT = flags.DEFINE_integer(
    "port", 2222, "Port of each worker, open to its peers only.", flag_values=FLAGS
)
VOLUME = flags.DEFINE_multi_string(
    "volume",
    [],
    "CLAIM:/PATH: a PersistentVolumeClaim that all workers mount, for the command's --workdir and"
    " data; repeatable. Nothing else of a pod outlives it.",
    flag_values=FLAGS,
)
CPU = flags.DEFINE_string(
    "cpu", "", "CPUs of each worker, as in 4 or 500m. Default: no limit.", flag_values=FLAGS
)
MEMORY = flags.DEFINE_string(
    "memory", "", "Memory of each worker, as in 8Gi. Default: no limit.", flag_values=FLAGS
)
TOKEN_SECRET = flags.DEFINE_string(
    "token_secret",
    None,
    "The Secret whose key `token` the workers prove to one another (DIST_TRAIN_TOKEN); the manifest"
    " says how to create it. Default: <name>-token; empty: no token.",
    flag_values=FLAGS,
)
LABEL = flags.DEFINE_multi_string(
    "label", [], "NAME=VALUE: for all documents and pods; repeatable.", flag_values=FLAGS
)
IMAGE_PULL_POLICY = flags.DEFINE_string(
    "image_pull_policy",
    "",
    "Always, IfNotPresent or Never. Default: what Kubernetes takes.",
    flag_values=FLAGS,
)
IMAGE_PULL_SECRET = flags.DEFINE_multi_string(
    "image_pull_secret", [], "A Secret for a private registry; repeatable.", flag_values=FLAGS
)
PRINT_DOCKERFILE = flags.DEFINE_bool(
    "print_dockerfile",
    False,
    "Print a Dockerfile for the image, to be built where this project's setup.cfg is, and end.",
    flag_values=FLAGS,
)

ALL = (
    IMAGE, KIND, NAME, NAMESPACE, PORT, VOLUME, CPU, MEMORY, TOKEN_SECRET, LABEL,
    IMAGE_PULL_POLICY, IMAGE_PULL_SECRET,
)  # fmt: skip
# What only a launcher that runs beside the workers can do, and what to do instead.
REFUSED = {
    "env": "put `env NAME=value` before the command",
    "hosts": "use --workers",
    "hostfile": "use --workers",
    "evaluator": "start `dist-train --mode=follow` as a Job of its own",
    "cpu_bind": "use --cpu",
    "start_timeout_s": "give it to dist-train, after the --",
    "stall_timeout_s": "give it to dist-train, after the --",
    "log_dir": "use kubectl logs",
    "tee": "use kubectl logs",
    "quiet": "use kubectl logs",
}
