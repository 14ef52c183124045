"""The ssh backend's plan, its dry run and its judgement of hosts, without a network."""

import json
import math
import shlex

import pytest

from launch import plan, preflight, ssh
from launch.binding import Cpu, Machine, Shares
from launch.hosts import Entry
from launch.job import Host, Job, Login

LOGIN = Login(("ssh", "--", "n"))


def machine(cpus=4, gpus=""):
    return Machine(tuple(Cpu(n, (0, n), 0) for n in range(cpus)), math.inf, tuple(gpus))


def job(hosts, **changes):
    slots = sum(host.slots for host in hosts)
    fields = {
        "command": ("train", "--epochs=3"),
        "directory": "/home/a b",
        "environ": {},
        "hosts": tuple(hosts),
        "shares": Shares(),
        "slots": tuple(range(slots)),
        "ports": tuple(range(4000, 4000 + slots)),
    }
    return Job(**{**fields, **changes})


def test_each_host_shares_out_its_own_cpus_and_gpus():
    hosts = [Host("n1", 1, machine(2, "0"), LOGIN), Host("n2", 2, machine(8, "0123"), LOGIN)]
    tasks = plan.plan(job(hosts))
    assert [task.place.cpus for task in tasks] == [(0, 1), (0, 1, 2, 3), (4, 5, 6, 7)]
    assert [task.env["CUDA_VISIBLE_DEVICES"] for task in tasks] == ["0", "0,1", "2,3"]
    assert [task.env["OMP_NUM_THREADS"] for task in tasks] == ["2", "4", "4"]
    assert [task.env["DIST_LAUNCH_LOCAL_INDEX"] for task in tasks] == ["0", "0", "1"]
    assert [task.remote_address for task in tasks] == ["n1", "n2", "n2"]
    cluster = json.loads(tasks[2].env["TF_CONFIG"])["cluster"]
    assert cluster == {"worker": ["n1:4000", "n2:4001", "n2:4002"]}


def test_host_that_is_left_out_leaves_the_others_their_places():
    hosts = [Host("n1", 1, None, LOGIN), Host("n2", 1, machine(2), LOGIN)]
    hosts.append(Host("n3", 2, machine(2), LOGIN))
    tasks = plan.plan(job(hosts, slots=(1, 3), ports=(4000, 4001), evaluator=True))
    assert [(task.name, task.host.address) for task in tasks] == [
        ("worker 0", "n2"),
        ("worker 1", "n3"),
        ("evaluator", "n2"),
    ]
    assert tasks[1].env["DIST_LAUNCH_LOCAL_INDEX"] == "1"
    assert tasks[1].place.cpus == (0, 1)


def test_ports_are_kept_by_the_agents_unless_they_are_to_be_released():
    hosts = [Host("n1", 2, machine(), LOGIN)]
    assert [task.held_port for task in plan.plan(job(hosts))] == [4000, 4001]
    assert [task.held_port for task in plan.plan(job(hosts, release_ports=True))] == [0, 0]


def test_login_has_the_flags_of_the_user_before_ours():
    access = ssh.Access("me", 2200, "/k y", ("-F", "conf"), "/opt/python3", 9.0)
    host = ssh.host(Entry("[fd00::1]", 2, "you"), access)
    command = list(host.login.ssh)
    assert command[:3] == ["ssh", "-F", "conf"]
    assert "-oBatchMode=yes" in command
    assert command[-8:] == ["-p", "2200", "-i", "/k y", "-l", "you", "--", "fd00::1"]
    assert ssh.host(Entry("n1"), access).login.ssh[-4:] == ("-l", "me", "--", "n1")
    assert (host.address, host.login.python, host.login.link_timeout_s) == (
        "[fd00::1]",
        "/opt/python3",
        9.0,
    )


def test_environment_goes_along_without_what_belongs_to_a_machine():
    environ = {
        "PATH": "/bin",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "XLA_FLAGS": "-x",
        "DIST_TRAIN_TOKEN": "hush",
        "TF_CONFIG": "{}",
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": "/root",
        "SSH_AUTH_SOCK": "/tmp/x",
        "MINE": "1",
        "ALSO": "2",
    }
    always = {"PATH", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS", "DIST_TRAIN_TOKEN"}
    assert set(ssh.carried_environment(environ, [])) == always
    carried = ssh.carried_environment(environ, ["MINE,ALSO", "NEW=a,b=c"])
    assert set(carried) == always | {"MINE", "ALSO", "NEW"}
    assert carried["NEW"] == "a,b=c"
    with pytest.raises(KeyError, match="NOT_SET"):
        ssh.carried_environment(environ, ["NOT_SET"])


def test_dry_run_line_is_exact_and_names_secrets_only():
    hosts = [ssh.host(Entry("n1"), ssh.Access()), ssh.host(Entry("n2"), ssh.Access())]
    environ = {"TF_X": "a b", "DIST_TRAIN_TOKEN": "hush"}
    comment, first, second = ssh.dry_run(job(hosts, ports=(), environ=environ))
    assert comment == "# not shown, but carried over: DIST_TRAIN_TOKEN"
    words = shlex.split(first)
    assert (words[0], words[-2]) == ("ssh", "n1")
    assert shlex.split(second)[-2] == "n2"
    config = {"worker": ["n1:20000", "n2:20001"]}
    config = {"cluster": config, "task": {"type": "worker", "index": 0}}
    assert words[-1].startswith("cd '/home/a b' && env 'TF_X=a b' ")
    assert f"TF_CONFIG={json.dumps(config)}" in shlex.split(words[-1])
    assert words[-1].endswith(" train --epochs=3")
    assert "hush" not in first + second


def survey(**changes):
    versions = {"Python": "3.11.7", "tensorflow": "2.21.0"}
    return {"listens": "10.0.0.1", "versions": versions, **changes}


def problems(**surveys):
    return preflight.problems(surveys, "train", "/d")


def test_equal_hosts_have_no_problem():
    assert problems(n1=survey(), n2=survey()) == []


@pytest.mark.parametrize(
    ("changes", "text", "status"),
    [
        (
            {"directory": "Permission denied"},
            "the working directory /d: Permission denied",
            2,
        ),
        ({"command": "missing"}, "the command train is missing; install it there", 127),
        ({"command": "not executable"}, "the command train is not executable; chmod +x", 127),
        ({"listens": "n2: Name or service not known"}, "cannot listen on its own name, n2", 2),
        ({"listens": "127.0.1.1"}, "it takes its own name for 127.0.1.1", 2),
        ({"listens": "::1"}, "it takes its own name for ::1", 2),
        (
            {"versions": {"Python": "3.11.7", "tensorflow": "2.20.0", "numpy": "2.0"}},
            "tensorflow 2.20.0 here, 2.21.0 on n1; numpy 2.0 here, missing on n1; install the same",
            2,
        ),
    ],
)
def test_problem_of_one_host_is_named_with_its_remedy(changes, text, status):
    [problem] = problems(n1=survey(), n2=survey(**changes))
    assert str(problem).startswith(f"n2: {text}")
    assert problem.status == status
    assert not problem.is_absent


def test_single_host_may_listen_on_loopback():
    assert problems(localhost=survey(listens="127.0.0.1")) == []


def test_command_that_is_no_python_program_has_no_versions_to_compare():
    assert problems(n1=survey(versions={}), n2=survey(versions={})) == []


@pytest.mark.parametrize(
    ("complaint", "remedy", "is_absent"),
    [
        ("root@n2: Permission denied (publickey).", "--ssh_identity", False),
        ("Host key verification failed.", "log in once by hand", False),
        ("bash: line 1: python3: command not found", "--remote_python", False),
        ("ssh: Could not resolve hostname n2: Name or service not known", "name right", False),
        ("ssh: connect to host n2 port 22: Connection timed out", "is it up", True),
        ("", "no answer within 10 s", True),
    ],
)
def test_complaint_of_ssh_has_a_remedy(complaint, remedy, is_absent):
    problem = preflight.unreachable("n2", complaint, "ssh n2")
    assert str(problem).startswith(f"n2: {complaint}")
    assert remedy in str(problem)
    assert problem.is_absent == is_absent


def test_clock_that_differs_by_more_than_the_question_took_is_a_warning():
    clocks = {
        "n1": (1000.0, 999.0, 1003.0),
        "n2": (1100.0, 999.0, 1003.0),
        "n3": (900.0, 999.0, 1003.0),
        "n4": (1007.0, 999.0, 1003.0),
    }
    assert [text.partition(" the")[0] for text in preflight.clock_warnings(clocks)] == [
        "n2: its clock is 97 s ahead of",
        "n3: its clock is 99 s behind",
    ]
