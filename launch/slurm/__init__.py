"""The Slurm backend: one batch job, whose one step is the group of workers.

Slurm starts, places, stops and requeues them: the launcher writes the script, submits it and shows
what comes. It can be killed without consequences for the job.
"""
