"""The plan of the backends that start the workers themselves: which runs where, with what."""

from dataclasses import replace

from launch import binding
from launch.binding import Place
from launch.job import Host, Job, Task, environment


def plan(job: Job) -> list[Task]:
    """The processes to start: the workers in the cluster's order, then the evaluator.

    GPUs belong to a place, so that a broken one is left out with it; a host's CPUs are shared out
    anew among its workers that are left. The evaluator is on the first worker's host, as it reads
    the chief's checkpoints; it gets the GPUs that are left there, if any, and is not bound.

    Raises:
        ValueError: a host has too few GPUs.
    """
    tasks = []
    first = 0
    for host in job.hosts:
        slots = [slot for slot in job.slots if first <= slot < first + host.slots]
        gpus, _ = divide_gpus(host, job)
        for slot, place in zip(slots, _divide_cpus(host, len(slots), job), strict=True):
            index, local_index = job.slots.index(slot), slot - first
            place = replace(place, gpus=gpus[local_index])
            env = environment(job, role="worker", index=index, local_index=local_index, place=place)
            port = 0 if job.release_ports else job.ports[index]
            name = f"worker {index}"
            tasks.append(Task(name, slot, job.command, job.directory, env, place, host, port))
        first += host.slots
    if job.evaluator:
        host = tasks[0].host
        place = Place(gpus=divide_gpus(host, job)[1])
        env = environment(job, role="evaluator", index=0, local_index=0, place=place)
        tasks.append(Task("evaluator", None, job.command, job.directory, env, place, host))
    return tasks


def divide_gpus(
    host: Host, job: Job
) -> tuple[list[tuple[str, ...] | None], tuple[str, ...] | None]:
    """The GPUs of each place of a host, and those that are left.

    Raises:
        ValueError: there are too few.
    """
    per_worker = job.shares.gpus_per_worker
    if host.machine is None:
        return [() if per_worker == 0 else None] * host.slots, None
    return binding.divide_gpus(host.machine.gpus, host.slots, per_worker)


def _divide_cpus(host: Host, workers: int, job: Job) -> list[Place]:
    if not workers:
        return []
    if host.machine is None:
        return [Place(threads=job.shares.threads)] * workers
    return binding.divide_cpus(
        host.machine, workers, bind=job.shares.bind, threads=job.shares.threads
    )
