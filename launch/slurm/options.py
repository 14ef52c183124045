"""The flags of the Slurm backend."""

from absl import flags

from launch.options import FLAGS

PARTITION = flags.DEFINE_string(
    "slurm_partition", "", "Default: the cluster's own.", flag_values=FLAGS
)
ACCOUNT = flags.DEFINE_string(
    "slurm_account", "", "Who pays. Default: the user's own.", flag_values=FLAGS
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

_ALL = (PARTITION, ACCOUNT, TIME, NODES, OPTIONS)


def given() -> list[str]:
    """The flags of this backend that the user has set."""
    return [holder.name for holder in _ALL if holder.present]
