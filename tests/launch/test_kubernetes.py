"""The documents of the Kubernetes backend: who the workers are, and what they may do."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.cluster import Cluster
from dist_train.environments import find_cluster
from launch import plan as local
from launch.binding import Machine, Shares
from launch.job import Host, Job
from launch.kubernetes import documents, pod
from launch.kubernetes.settings import KINDS, Settings, Volume

COMMAND = ("dist-train", "--strategy=multi_worker", "--workdir=/runs/a")
OURS = {"app.kubernetes.io/instance": "mnist", "app.kubernetes.io/managed-by": "dist-launch"}


def plan(command=COMMAND, threads=0, **changes):
    """The documents by their kinds."""
    fields = {"kind": "job", "name": "mnist", "image": "mnist:1", "workers": 3, **changes}
    settings = Settings(**fields)
    found = documents.plan(pod.job(command, settings, threads), settings)
    return {document["kind"]: document for document in found}


def template(found):
    """The pod template of a plan."""
    if "TFJob" in found:
        return found["TFJob"]["spec"]["tfReplicaSpecs"]["Worker"]["template"]
    return job_spec(found)["template"]


def job_spec(found):
    if "Job" in found:
        return found["Job"]["spec"]
    [replicated_job] = jobset_spec(found)["replicatedJobs"]
    return replicated_job["template"]["spec"]


def jobset_spec(found):
    if "JobSet" in found:
        return found["JobSet"]["spec"]
    return found["TrainingRuntime"]["spec"]["template"]["spec"]


def container(found):
    [only] = template(found)["spec"]["containers"]
    return only


def environment(kubelet, found, index):
    """What the process of an index gets to see."""
    environ = kubelet.environment(template(found), index)
    if "TFJob" in found:  # its operator's part, as its source has it
        assert "TF_CONFIG" not in environ
        workers = [f"mnist-worker-{i}.ml.svc:2222" for i in range(3)]
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": workers}, "task": task, "environment": "cloud"}
        environ["TF_CONFIG"] = json.dumps(config)
    return environ


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("job", "mnist-{}.mnist:2222"),
        ("jobset", "mnist-worker-0-{}.mnist:2222"),
        ("trainjob", "mnist-node-0-{}.mnist:2222"),
        ("tfjob", "mnist-worker-{}.ml.svc:2222"),
    ],
)
def test_every_worker_finds_itself_in_the_cluster(kubelet, kind, pattern):
    found = plan(kind=kind)
    addresses = tuple(pattern.format(index) for index in range(3))
    for index in range(3):
        environ = environment(kubelet, found, index)
        assert find_cluster(environ, "multi_worker", 1.0) == Cluster(addresses, index)
        assert environ["DIST_LAUNCH_INDEX"] == str(index)
        assert environ["DIST_LAUNCH_WORKERS"] == "3"
        for name in ("no_proxy", "NO_PROXY"):
            exceptions = environ[name].split(",")
            hosts = [address.rpartition(":")[0] for address in addresses]
            assert all(any(host.endswith(end) for end in exceptions) for host in hosts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [2, 11])
def test_workers_are_in_the_order_of_the_local_backend(kubelet, kind, workers):
    job = Job(
        command=COMMAND,
        directory="/",
        environ={},
        hosts=(Host("127.0.0.1", workers, Machine((), math.inf, ())),),
        shares=Shares(),
        slots=tuple(range(workers)),
        ports=tuple(range(4000, 4000 + workers)),
    )
    found = plan(kind=kind, workers=workers)
    names = ("DIST_LAUNCH_ROLE", "DIST_LAUNCH_INDEX", "DIST_LAUNCH_WORKERS")
    for index, task in enumerate(local.plan(job)):
        environ = kubelet.environment(template(found), index)
        assert [environ[name] for name in names] == [task.env[name] for name in names]
        if kind != "tfjob":  # whose operator writes it
            mine, theirs = (json.loads(env["TF_CONFIG"]) for env in (environ, task.env))
            assert mine["task"] == theirs["task"]
            assert len(mine["cluster"]["worker"]) == len(theirs["cluster"]["worker"])
            assert mine.keys() == theirs.keys()


def test_host_names_are_those_that_kubernetes_gives():
    found = plan()
    spec = template(found)["spec"]
    assert spec["subdomain"] == found["Service"]["metadata"]["name"] == "mnist"
    assert "hostname" not in spec  # the Job controller sets <job>-<index> where there is none
    assert found["Job"]["metadata"]["name"] == "mnist"
    for kind, replicated_job in (("jobset", "worker"), ("trainjob", "node")):
        spec = jobset_spec(plan(kind=kind))
        assert spec["replicatedJobs"][0]["name"] == replicated_job
        assert spec["replicatedJobs"][0]["replicas"] == 1
        assert spec["network"] == {
            "enableDNSHostnames": True,
            "publishNotReadyAddresses": True,
            "subdomain": "mnist",
        }


@given(st.lists(st.text(st.sampled_from("$()AZ_ a{}`\\")), min_size=1))
def test_the_command_arrives_as_it_was_given(kubelet, command):
    found = plan(command=tuple(command))
    environ = {"AZ": "expanded", **kubelet.environment(template(found), 0)}
    assert [kubelet.expand(text, environ) for text in container(found)["command"]] == command


def test_service_answers_for_workers_that_are_not_ready():
    assert plan()["Service"]["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": OURS,
        "ports": [{"name": "tensorflow", "port": 2222}],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_workers_reach_a_worker(kind):
    found = plan(kind=kind, labels={"team": "a"})
    assert next(iter(found)) == "NetworkPolicy"  # before there is anything to reach
    peers = {"podSelector": {"matchLabels": OURS}}
    assert found["NetworkPolicy"]["spec"] == {
        **peers,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [peers]}],
    }
    assert template(found)["metadata"]["labels"] == {"team": "a", **OURS}
    for document in found.values():
        assert document["metadata"]["labels"] == {"team": "a", **OURS}


@pytest.mark.parametrize("kind", KINDS)
def test_workers_have_no_rights_that_they_do_not_need(kind, kubelet):
    found = plan(kind=kind)
    spec = template(found)["spec"]
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(found)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert spec["automountServiceAccountToken"] is False
    assert spec["volumes"] == [{"name": "tmp", "emptyDir": {}}]
    assert container(found)["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert environment(kubelet, found, 0)["HOME"] == "/tmp"  # the one folder that they can write
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()


def test_token_comes_from_the_secret(kubelet):
    kubelet.secrets["mnist-token"] = {"token": "xyz"}
    found = plan(token_secret="mnist-token")
    assert environment(kubelet, found, 1)["DIST_TRAIN_TOKEN"] == "xyz"
    assert "DIST_TRAIN_TOKEN" not in environment(kubelet, plan(), 1)


def test_claims_are_mounted():
    found = plan(volumes=(Volume("runs", "/runs"), Volume("data.v2", "/data/in")))
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in template(found)["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    paths = {mount["name"]: mount["mountPath"] for mount in container(found)["volumeMounts"]}
    assert {claims[name]: paths[name] for name in claims} == {
        "runs": "/runs",
        "data.v2": "/data/in",
    }


def test_resources_are_guaranteed_and_threads_follow_the_cpus(kubelet):
    found = plan(cpu="4500m", memory="8Gi", gpus=2)
    amounts = {"cpu": "4500m", "memory": "8Gi", "nvidia.com/gpu": "2"}
    assert container(found)["resources"] == {"requests": amounts, "limits": amounts}
    assert environment(kubelet, found, 0)["TF_NUM_INTRAOP_THREADS"] == "4"
    assert environment(kubelet, plan(cpu="0.5"), 0)["OMP_NUM_THREADS"] == "1"
    assert environment(kubelet, plan(cpu="4", threads=2), 0)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in environment(kubelet, plan(), 0)
    assert container(plan())["resources"] == {}
    shared_memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    assert shared_memory in template(found)["spec"]["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container(found)["volumeMounts"]


@pytest.mark.parametrize(("gpus", "visible"), [(None, None), (0, "-1"), (1, None)])
def test_gpus_are_hidden_only_where_none_are_wanted(kubelet, gpus, visible):
    environ = environment(kubelet, plan(gpus=gpus), 0)
    assert environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_wishes_for_the_pods_are_taken_over():
    found = plan(
        grace_period_s=90,
        namespace="ml",
        port=4000,
        pull_policy="Always",
        pull_secrets=("registry",),
    )
    spec = template(found)["spec"]
    assert spec["terminationGracePeriodSeconds"] == 90
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert container(found)["imagePullPolicy"] == "Always"
    assert container(found)["image"] == "mnist:1"
    assert container(found)["ports"] == [{"name": "tensorflow", "containerPort": 4000}]
    assert found["Service"]["spec"]["ports"] == [{"name": "tensorflow", "port": 4000}]
    assert all(document["metadata"]["namespace"] == "ml" for document in found.values())


def what_becomes_of(spec, code=None, condition=None):
    """The action of a Job's podFailurePolicy, as the controller picks it."""
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["operator"] == "In"
            if code in rule["onExitCodes"]["values"]:
                return rule["action"]
        else:
            [wanted] = rule["onPodConditions"]
            if condition == wanted["type"] and wanted["status"] == "True":
                return rule["action"]
    return "Count"


@pytest.mark.parametrize(
    ("kind", "on_request"), [("job", "Ignore"), ("jobset", "FailJob"), ("trainjob", "FailJob")]
)
def test_a_stop_on_request_is_a_disruption_and_no_failure(kind, on_request):
    spec = job_spec(plan(kind=kind))
    assert what_becomes_of(spec, code=75) == on_request
    assert what_becomes_of(spec, code=143) == on_request
    assert what_becomes_of(spec, code=137, condition="DisruptionTarget") == on_request
    assert what_becomes_of(spec, code=1) == what_becomes_of(spec, code=137) == "Count"
    assert spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # else the policy has no effect
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 3


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_jobset_starts_the_group_again(kubelet, kind):
    found = plan(kind=kind, max_restarts=4)
    assert jobset_spec(found)["failurePolicy"] == {
        "maxRestarts": 4,
        "rules": [
            {
                "name": "stoppedOnRequest",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }
    assert environment(kubelet, found, 0)["DIST_LAUNCH_RESTART"] == "0"


def test_nothing_is_said_of_restarts_that_nobody_counts(kubelet):
    assert "DIST_LAUNCH_RESTART" not in environment(kubelet, plan(), 0)


def test_trainjob_takes_its_own_runtime():
    found = plan(kind="trainjob")
    order = list(found)
    assert order.index("TrainingRuntime") < order.index("TrainJob")  # its webhook looks for it
    assert found["TrainJob"]["spec"] == {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "TrainingRuntime",
            "name": found["TrainingRuntime"]["metadata"]["name"],
        },
        "trainer": {"numNodes": 3, "image": "mnist:1", "command": list(COMMAND)},
    }
    assert found["TrainingRuntime"]["spec"]["mlPolicy"] == {"numNodes": 3}
    [replicated_job] = jobset_spec(found)["replicatedJobs"]
    assert replicated_job["template"]["metadata"]["labels"] == {
        "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
    }
    assert container(found)["name"] == "node"  # the one that the Trainer gives the command


def test_tfjob_is_as_its_operator_demands():
    found = plan(kind="tfjob")
    spec = found["TFJob"]["spec"]
    assert list(spec["tfReplicaSpecs"]) == ["Worker"]  # no chief: worker 0 is it
    worker = spec["tfReplicaSpecs"]["Worker"]
    assert (worker["replicas"], worker["restartPolicy"]) == (3, "Never")
    assert "restartPolicy" not in worker["template"]["spec"]
    assert spec["successPolicy"] == "AllWorkers"
    assert spec["runPolicy"] == {"cleanPodPolicy": "Running"}
    assert container(found)["name"] == "tensorflow"
    assert container(found)["ports"] == [{"name": "tfjob-port", "containerPort": 2222}]


def test_tfjob_counts_the_restarts_of_all_workers():
    spec = plan(kind="tfjob", max_restarts=2)["TFJob"]["spec"]
    assert spec["tfReplicaSpecs"]["Worker"]["restartPolicy"] == "OnFailure"
    # It fails at the seventh: two restarts of three workers are good, the next is not.
    assert spec["runPolicy"]["backoffLimit"] == 7
