import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train import UsageError
from dist_train.cluster import Cluster
from dist_train.environments import find_cluster

_A, _B, _C = "n1:4000", "n2:4000", "n3:4000"


def _text(cluster=None, kind="worker", index=0, **changed) -> str:
    cluster = {"worker": [_A, _B]} if cluster is None else cluster
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}, **changed})


def _of(text: str, strategy: str = "multi_worker") -> Cluster | None:
    return find_cluster({"TF_CONFIG": text}, strategy, 1.0)


def test_workers_are_in_the_order_of_the_text():
    cluster = _of(_text({"worker": [_C, _A, _B]}, index=2))
    assert cluster == Cluster((_C, _A, _B), 2)
    assert not cluster.is_chief
    assert cluster.name(2) == "worker 2 (n2:4000)"


def test_a_chief_comes_before_the_workers():
    jobs = {"worker": [_A, _B], "chief": [_C]}
    assert _of(_text(jobs, "chief", 0)) == Cluster((_C, _A, _B), 0)
    assert _of(_text(jobs, "chief", 0)).is_chief
    assert _of(_text(jobs, "worker", 0)) == Cluster((_C, _A, _B), 1)
    assert _of(_text(jobs, "worker", 1)) == Cluster((_C, _A, _B), 2)


@pytest.mark.parametrize(
    ("kind", "index", "expected"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)]
)
def test_the_text_of_kubeflow_s_operator_is_understood(kind, index, expected):
    hosts = {
        "chief": ["mnist-chief-0.ml.svc:2222"],
        "worker": ["mnist-worker-0.ml.svc:2222", "mnist-worker-1.ml.svc:2222"],
    }
    cluster = _of(_text(hosts, kind, index, environment="cloud"))
    assert cluster == Cluster((*hosts["chief"], *hosts["worker"]), expected)


def test_without_a_chief_worker_0_is_the_chief():
    assert _of(_text(index=0)).is_chief


def test_an_evaluator_is_no_worker():
    assert _of(_text({"worker": [_A], "evaluator": [_B]})) == Cluster((_A,), 0)


def test_an_index_may_be_text():
    assert _of(_text(index="1")) == Cluster((_A, _B), 1)


@pytest.mark.parametrize(
    "address", ["localhost:1", "127.0.0.1:65535", "[::1]:22", "[fe80::1%eth0]:22", "a_b-c.d.:80"]
)
def test_names_and_ip_addresses_are_addresses(address):
    assert _of(_text({"worker": [address]})).addresses == (address,)


@pytest.mark.parametrize("strategy", ["default", "mirrored"])
def test_one_process_needs_no_cluster(strategy):
    assert find_cluster({}, strategy, 1.0) is None
    assert find_cluster({"TF_CONFIG": ""}, strategy, 1.0) is None
    assert _of(_text({"worker": [_A]}), strategy) is None


@pytest.mark.parametrize("strategy", ["default", "mirrored"])
def test_four_workers_never_become_four_single_runs(strategy):
    with pytest.raises(UsageError, match=f"has 2 workers but strategy={strategy}"):
        _of(_text(), strategy)


@pytest.mark.parametrize("environ", [{}, {"TF_CONFIG": ""}])
def test_multi_worker_without_a_cluster_is_an_error(environ):
    with pytest.raises(UsageError, match=r"TF_CONFIG, which is not set; start it with dist-launch"):
        find_cluster(environ, "multi_worker", 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{\n\n'a': 1}", "is not JSON"),
        (" ", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("{}", "no 'cluster'"),
        ('{"cluster": {}, "task": {"type": "worker", "index": 0}}', "no 'cluster'"),
        ('{"cluster": ["a:1"]}', "no 'cluster'"),
        (_text({"worker": []}), "its cluster has no worker"),
        (_text({"evaluator": [_A]}), "its cluster has no worker"),
        (_text({"worker": _A}), "'worker' is not a list of addresses"),
        (_text({"worker": [1]}), "'worker' is not a list of addresses"),
        (_text({"chief": None, "worker": [_A]}), "'chief' is not a list of addresses"),
        (_text({"worker": [_A], "ps": [_B]}), "has 'ps'; .* parameter servers"),
        (_text({"chief": [_A, _B]}), "names 2 chiefs"),
        (_text({"worker": [_A, _B, _A]}), "n1:4000 stands for two workers"),
        (_text({"worker": [_A], "chief": [_A]}), "n1:4000 stands for two workers"),
        (_text({"worker": ["n1"]}), "'n1' is no address"),
        (_text({"worker": [":1"]}), "':1' is no address"),
        (_text({"worker": ["n1:0"]}), "'n1:0' is no address"),
        (_text({"worker": ["n1:65536"]}), "'n1:65536' is no address"),
        (_text({"worker": ["n1:-1"]}), "'n1:-1' is no address"),
        (_text({"worker": ["n1:" + "9" * 5000]}), "is no address"),
        (_text({"worker": ["n1:٣"]}), "is no address"),
        (_text({"worker": ["n1..n2:80"]}), "'n1..n2:80' is no address"),
        (_text({"worker": ["n" * 64 + ":80"]}), "is no address"),
        (_text({"worker": ["http://n1:80"]}), "is no address"),
        (_text({"worker": ["::1:80"]}), "is no address"),
        (_text({"worker": ["n1:80\n"]}), "is no address"),
        (_text(task=None), "'task' does not say which worker"),
        (_text(task={"type": "worker"}), "'task' does not say which worker"),
        (_text(task={"index": 0}), "'task' does not say which worker"),
        (_text(index=2), "task index is 2; the cluster has worker 0 to 1"),
        (_text(index=-1), "task index is -1; the cluster has worker 0 to 1"),
        (_text(index=True), "task index is True"),
        (_text(index=0.0), "task index is 0.0"),
        (_text(index="9" * 5000), "task index is"),
        (_text(index="²"), "task index is '²'"),
        (_text(index=None), "task index is None"),
        (_text(kind="chief"), "the cluster has no 'chief'"),
        (_text(kind="ps"), "its task is 'ps'; only 'chief' and 'worker'"),
        (_text({"worker": [_A], "evaluator": [_B]}, "evaluator"), "its task is 'evaluator'"),
        (_text(kind=["worker"]), "its task is"),
    ],
)
def test_unusable_text_is_an_error_of_one_line_with_a_remedy(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        _of(text)
    assert "TF_CONFIG" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_ADDRESSES = st.lists(
    st.sampled_from([_A, _B, _C, "n1", "[::1]:1", ":0"]) | st.text(max_size=6), max_size=4
)


@settings(max_examples=300)
@given(
    st.text(max_size=30)
    | _JSON.map(json.dumps)
    | st.fixed_dictionaries(
        {
            "cluster": st.dictionaries(
                st.sampled_from(["worker", "chief", "evaluator", "ps"]), _ADDRESSES | _JSON
            ),
            "task": st.fixed_dictionaries(
                {
                    "type": st.sampled_from(["worker", "chief", "evaluator"]) | _JSON,
                    "index": st.integers(-1, 3) | st.sampled_from(["0", "1", "x"]) | _JSON,
                }
            )
            | _JSON,
        }
    ).map(json.dumps)
)
def test_any_text_is_the_cluster_it_says_or_an_error(text):
    try:
        cluster = _of(text)
    except UsageError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert len(message.splitlines()) == 1
        return
    config = json.loads(text)
    jobs, task = config["cluster"], config["task"]
    assert list(cluster.addresses) == [*jobs.get("chief", []), *jobs.get("worker", [])]
    assert len(set(cluster.addresses)) == len(cluster.addresses)
    assert cluster.addresses[cluster.index] == jobs[task["type"]][int(task["index"])]
    assert all(re.search(r":\d{1,5}$", address) for address in cluster.addresses)
