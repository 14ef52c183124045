"""Trainings under a real mpirun, on one host and on two, and how ranks find one another."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import hosts
import pytest
import sshd
from trajectory import AT_ONCE, TRAIN, assert_same_run, wait_for_step

ROOT = hosts.Path(__file__).parents[2]
WORKER = [sys.executable, *TRAIN, "--strategy=multi_worker", "--workdir=run"]
# What a rank makes of its environment.
SAY = """
import json, os, socket
from dist_train.environments import find_cluster
cluster = find_cluster(os.environ, "multi_worker", 20.0)
line = "RANK " + json.dumps([cluster.index, socket.gethostname(), cluster.addresses]) + "\\n"
os.write(1, line.encode())  # at once, or those of several ranks get mixed
"""
NETWORK = "10.77.0.0/24"
# mpirun finds Slurm's programs, and would ask them; and it refuses to run as root, unasked.
ENVIRON = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_plm": "^slurm",
    "OMPI_MCA_ras": "^slurm",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_NUM_INTRAOP_THREADS": "1",
}

pytestmark = pytest.mark.skipif(bool(sshd.why_not()), reason=sshd.why_not() or "-")
openmpi = pytest.mark.skipif(
    not shutil.which("mpirun.openmpi"), reason="needs the program `mpirun.openmpi` (openmpi-bin)"
)
mpich = pytest.mark.skipif(
    not shutil.which("mpiexec.hydra"), reason="needs the program `mpiexec.hydra` (mpich)"
)


@pytest.fixture
def start(ssh_hosts, tmp_path):
    """fn(command, env) -> its process at the head of the network; nothing is left afterwards."""
    network, _ = ssh_hosts
    # Whichever MPI else is there.
    programs = tmp_path / "bin"
    programs.mkdir()
    if shutil.which("mpirun.openmpi"):
        (programs / "mpirun").symlink_to(shutil.which("mpirun.openmpi"))
    before = set(processes(network))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    inherited |= {**ENVIRON, "PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}

    def run(command, env=()):
        log = tmp_path / "log"
        with log.open("wb") as file:
            process = network.head.start(
                command,
                cwd=tmp_path,
                env={**inherited, **dict(env)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        process.log = log
        return process

    yield run
    ended = hosts.wait_until(lambda: set(processes(network)) <= before, 20)
    assert ended, {pid: text for pid, text in processes(network).items() if pid not in before}


def processes(network):
    everywhere = (network.head, *network.hosts)
    return {pid: text for host in everywhere for pid, text in host.processes().items()}


def over(ssh_hosts, names):
    """Options of mpirun for ranks on these hosts."""
    _, config = ssh_hosts
    options = [f"--host {names}", f'--mca plm_rsh_agent "ssh -F {config}"', "-x PYTHONPATH"]
    options += ["-x CUDA_VISIBLE_DEVICES", "-x TF_NUM_INTRAOP_THREADS"]
    options += [f"--mca {kind}_tcp_if_include {NETWORK}" for kind in ("oob", "btl")]
    return " ".join(options)


def launch(*flags, command=WORKER):
    return [sys.executable, "-m", "launch", "--backend=mpi", *flags, "--", *command]


def said(process):
    """What each rank said of itself, by rank."""
    assert process.wait(60) == 0, process.log.read_text()
    # Among them mpirun may say something of its own.
    found = re.findall("^RANK (.*)", process.log.read_text(), re.MULTILINE)
    return sorted(json.loads(line) for line in found)


@openmpi
def test_ranks_of_one_host_meet_on_loopback(start):
    ranks = said(start(launch("--workers=3", command=[sys.executable, "-c", SAY])))
    assert [index for index, *_ in ranks] == [0, 1, 2]
    addresses = ranks[0][2]
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert len(set(addresses)) == 3
    assert all(others == addresses for *_, others in ranks)


@openmpi
@pytest.mark.parametrize("mapping", ["slot", "node"])
def test_ranks_of_several_hosts_learn_who_runs_where(start, ssh_hosts, mapping):
    options = f"{over(ssh_hosts, 'n1:2,n2:2')} --map-by {mapping}"
    command = launch("--workers=4", f"--mpi_options={options}", command=[sys.executable, "-c", SAY])
    ranks = said(start(command))
    assert [index for index, *_ in ranks] == [0, 1, 2, 3]
    addresses = ranks[0][2]
    names = [address.split(":")[0] for address in addresses]
    assert names == [host for _, host, _ in ranks]
    assert names == {"slot": ["n1", "n1", "n2", "n2"], "node": ["n1", "n2"] * 2}[mapping]
    assert len(set(addresses)) == 4
    assert all(others == addresses for *_, others in ranks)


@mpich
@pytest.mark.parametrize("names", ["head", "n1,n2"])
def test_ranks_of_mpich_tell_one_another_who_runs_where(start, ssh_hosts, tmp_path, names):
    _, config = ssh_hosts
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec ssh -F {config} "$@"\n')
    ssh.chmod(0o755)
    options = ["-hosts", names, "-launcher", "ssh", "-launcher-exec", ssh]
    command = ["mpiexec.hydra", *options, "-n", "4", sys.executable, "-c", SAY]
    ranks = said(start(command))
    assert [index for index, *_ in ranks] == [0, 1, 2, 3]
    addresses = ranks[0][2]
    hosts_of = [address.split(":")[0] for address in addresses]
    if names == "head":
        assert set(hosts_of) == {"127.0.0.1"}
    else:
        assert hosts_of == [host for _, host, _ in ranks]
        assert set(hosts_of) == {"n1", "n2"}
    assert len(set(addresses)) == 4
    assert all(others == addresses for *_, others in ranks)


@openmpi
def test_several_ranks_are_not_trained_one_by_one_by_default(start, tmp_path):
    command = [sys.executable, *TRAIN, "--workdir=run"]
    process = start(launch("--grace_period_s=1", command=command))
    assert process.wait(60) == 2
    assert "mpirun has 2 workers but strategy=default" in process.log.read_text()
    assert not (tmp_path / "run").exists()


@openmpi
@pytest.mark.slow
def test_two_ranks_follow_the_trajectory_of_one_process(start, tmp_path, whole_run):
    process = start(launch(command=[*WORKER, AT_ONCE]))
    assert process.wait(180) == 0, process.log.read_text()
    assert_same_run(tmp_path / "run", whole_run)


@openmpi
@pytest.mark.slow
def test_a_rank_that_is_killed_on_another_host_ends_all_and_nothing_is_lost(
    start, ssh_hosts, tmp_path, whole_run
):
    network, _ = ssh_hosts
    options = f"{over(ssh_hosts, 'n1,n2')} --wdir {tmp_path}"
    command = launch("--grace_period_s=1", f"--mpi_options={options}")
    process = start(command)
    wait_for_step(tmp_path / "run", 300, process)
    [victim] = [pid for pid, text in network["n2"].processes().items() if is_trainer(text)]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(60) != 0
    assert re.search("rank 1.* on node n2 .*signal 9", process.log.read_text(), re.DOTALL)
    again = start(command)
    assert again.wait(180) == 0, again.log.read_text()
    assert "resumed after step" in again.log.read_text()
    assert_same_run(tmp_path / "run", whole_run)


# mpirun passes SIGUSR1 on at once, and SIGTERM follows on the other.
@openmpi
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_request_lets_the_ranks_save_and_leaves_nothing(start, ssh_hosts, tmp_path, number):
    network, _ = ssh_hosts
    command = [*WORKER, "--epochs=1000"]  # mpirun lets them go on for the period first
    process = start(launch("--grace_period_s=4", command=command))
    wait_for_step(tmp_path / "run", 100, process)
    os.kill(process.inside, number)
    assert process.wait(60) != 0
    assert re.search(r"SIG\w+ after step [\d,]+, saved", process.log.read_text())
    assert not [text for text in network.head.processes().values() if is_trainer(text)]


def is_trainer(text):
    return re.match(r"\S+ -m dist_train ", text) is not None
