"""The local backend: all workers on this machine."""

from dataclasses import replace

from launch import binding
from launch.binding import Place
from launch.job import Job, Task, environment

ADDRESS = "127.0.0.1"


def plan(job: Job) -> list[Task]:
    """The processes to start: the workers in the cluster's order, then the evaluator.

    GPUs belong to a place, so that a broken one is left out with it; CPUs are shared out anew among
    those that are left. The evaluator gets the GPUs that are left, if any, and is not bound.

    Raises:
        ValueError: there are too few GPUs.
    """
    [host] = job.hosts
    gpus, gpus_left = binding.divide_gpus(job.machine.gpus, host.slots, job.shares.gpus_per_worker)
    places = binding.divide_cpus(
        job.machine, len(job.slots), bind=job.shares.bind, threads=job.shares.threads
    )
    tasks = []
    for index, (slot, place) in enumerate(zip(job.slots, places, strict=True)):
        place = replace(place, gpus=gpus[slot])
        env = environment(job, role="worker", index=index, local_index=slot, place=place)
        tasks.append(Task(f"worker {index}", slot, job.command, job.directory, env, place))
    if job.evaluator:
        place = Place(gpus=gpus_left)
        env = environment(job, role="evaluator", index=0, local_index=0, place=place)
        tasks.append(Task("evaluator", None, job.command, job.directory, env, place))
    return tasks
