"""The flags of the Slurm backend."""

from absl import flags

from launch.options import FLAGS

PARTITION = flags.DEFINE_string(
    "slurm_partition", "", "Partition of the job. Default: the cluster's own.", flag_values=FLAGS
)
ACCOUNT = flags.DEFINE_string(
    "slurm_account", "", "Account that pays. Default: the user's own.", flag_values=FLAGS
)
TIME = flags.DEFINE_string(
    "slurm_time",
    "",
    "Time limit of one start, as in 8:00:00 or 2-00:00:00. Two to three minutes before it the"
    " workers save and stop, and the job is requeued. Default: the partition's.",
    flag_values=FLAGS,
)
NODES = flags.DEFINE_integer(
    "slurm_nodes",
    0,
    "Nodes for the --workers; 0: as many as Slurm needs.",
    lower_bound=0,
    flag_values=FLAGS,
)
OPTIONS = flags.DEFINE_multi_string(
    "slurm_options",
    [],
    "Further options of sbatch, as in '--mem=8G --exclusive'; repeatable.",
    flag_values=FLAGS,
)

ALL = (PARTITION, ACCOUNT, TIME, NODES, OPTIONS)
# What Slurm does in its own way, and how to ask it.
REFUSED = {
    "hosts": "use --slurm_options=--nodelist=n1,n2",
    "hostfile": "use --slurm_options=--nodefile=FILE",
    "env": "Slurm carries the whole environment over, see --slurm_options=--export=...",
    "evaluator": "start `dist-train --mode=follow` as a job of its own",
    "cpu_bind": "use --slurm_options=--cpu-bind=...",
    "start_timeout_s": "give it to dist-train, after the --",
    "stall_timeout_s": "give it to dist-train, after the --",
    "grace_period_s": "Slurm's KillWait is the time between SIGTERM and SIGKILL",
}
