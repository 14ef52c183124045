"""A training in the pods of a generated Job, with this test as kubelet and as Job controller."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import yaml
from trajectory import TRAIN, assert_same_run, wait_for_step

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKERS = 2


# What a container's runtime does by the security context: a root that is read-only but for the
# volumes, no privileges, and a user that is not root. (It is root outside of its user namespace, so
# that it may read wherever the tests are installed.)
CONTAINER = """
mount --make-rprivate /
mount --bind "$1" "$1"
mount --bind "$2" "$2"
mount -o remount,bind,ro /
shift 2
if touch /written 2>/dev/null; then echo "the root can be written"; exit 1; fi
exec unshare --user --map-user=1000 --map-group=1000 setpriv --no-new-privs sh -ec '
[ "$(id -u)" = 1000 ]
grep -q "^CapEff:.0000000000000000$" /proc/self/status
grep -q "^NoNewPrivs:.1$" /proc/self/status
exec "$@"' container "$@"
"""


def base_environment():
    """What an image gives its processes."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
    }


@pytest.fixture
def job(tmp_path):
    """The Job that the launcher prints, as a reader of YAML has it."""
    printed = subprocess.run(
        [
            *(sys.executable, "-m", "launch", "--backend=kubernetes", f"--workers={WORKERS}"),
            *("--name=mnist", "--image=mnist:1", "--cpu=1", f"--volume=runs:{tmp_path}/claim"),
            *("--", sys.executable, *TRAIN, "--strategy=multi_worker"),
            f"--workdir={tmp_path}/claim/run",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    ).stdout
    return {d["kind"]: d for d in yaml.safe_load_all(printed)}["Job"]


@pytest.fixture
def start_pods(job, kubelet, group, addresses, tmp_path):
    """fn() -> the pods' processes. Their names lead to this machine, each to a port of its own."""
    kubelet.secrets["mnist-token"] = {"token": "of this test"}

    def start():
        template = job["spec"]["template"]
        [container] = template["spec"]["containers"]
        python, *arguments = container["command"]
        assert python == sys.executable
        pods = []
        names = [f"mnist-{index}.mnist:2222" for index in range(WORKERS)]
        network = dict(zip(names, addresses(WORKERS), strict=True))
        for index in range(job["spec"]["completions"]):
            environ = kubelet.environment(template, index)
            for name, address in network.items():
                assert name in environ["TF_CONFIG"]
                environ["TF_CONFIG"] = environ["TF_CONFIG"].replace(name, address)
            assert environ["HOME"] == "/tmp"  # an emptyDir, which lives as long as the pod
            home = tmp_path / f"pod-{len(group.processes)}"
            home.mkdir()
            environ |= {"HOME": str(home), "TMPDIR": str(home)}
            pods.append(group.start(arguments, environ=environ))
        return pods

    return start


@pytest.mark.slow
def test_an_evicted_pod_stops_all_and_their_successors_end_on_the_known_trajectory(
    job, start_pods, group, tmp_path, whole_run
):
    run = tmp_path / "claim" / "run"
    pods = start_pods()
    wait_for_step(run, 200, *pods)
    pods[1].send_signal(signal.SIGTERM)
    grace_s = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert [pod.wait(grace_s) for pod in pods] == [75, 75], group.output(0)
    on_exit = job["spec"]["podFailurePolicy"]["rules"][0]
    assert (on_exit["action"], 75 in on_exit["onExitCodes"]["values"]) == ("Ignore", True)

    pods = start_pods()  # so the Job controller replaces both
    assert [pod.wait(120) for pod in pods] == [0, 0], pods[0].log.read_text()
    assert "resumed after step" in pods[0].log.read_text()
    assert_same_run(run, whole_run)


@pytest.mark.slow
@pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not() or "-")
def test_pods_train_under_their_own_names_without_the_rights_they_give_up(
    job, kubelet, tmp_path, whole_run
):
    """Each on a host of its own: one port for all, not as root, on a read-only root.

    And as with a cluster's DNS, the names are known only when the pods have been up for a while.
    """
    kubelet.secrets["mnist-token"] = {"token": "of this test"}
    template = job["spec"]["template"]
    [container] = template["spec"]["containers"]
    claim = tmp_path / "claim"
    names = [f"mnist-{index}.{template['spec']['subdomain']}" for index in range(WORKERS)]
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(hosts.Network(tmp_path, names))
        hosts_file = tmp_path / "hosts"
        all_names = hosts_file.read_text()
        hosts_file.write_text("127.0.0.1 localhost\n")
        pods = []
        for index, host in enumerate(network.hosts):
            folder = tmp_path / f"tmp-{index}"
            for each in (folder, claim):
                each.mkdir(exist_ok=True)
                each.chmod(0o777)
            environ = {**base_environment(), **kubelet.environment(template, index)}
            environ |= {"HOME": str(folder), "TMPDIR": str(folder)}
            pods.append(
                stack.enter_context(
                    host.start(
                        ["sh", "-ec", CONTAINER, "container", folder, claim, *container["command"]],
                        env=environ,
                        cwd=folder,
                        stdout=stack.enter_context((tmp_path / f"log-{index}").open("wb")),
                        stderr=subprocess.STDOUT,
                    )
                )
            )
        waits = "waiting for the chief's own name, mnist-0.mnist"
        logs = [tmp_path / f"log-{index}" for index in range(WORKERS)]
        hosts.wait_until(lambda: waits in logs[0].read_text() or pods[0].poll() is not None, 60)
        assert waits in logs[0].read_text(), logs[0].read_text()
        hosts_file.write_text(all_names)
        statuses = [pod.wait(90) for pod in pods]
    assert statuses == [0, 0], "\n".join(log.read_text() for log in logs)
    assert_same_run(claim / "run", whole_run)
