"""Which devices train; those of machines with GPUs are described, not there."""

import pytest
import tensorflow as tf

from dist_train import UsageError, replicas
from dist_train.replicas import DevicePlan, plan


@pytest.mark.parametrize(
    ("strategy", "devices", "gpus", "expected"),
    [
        ("default", 0, 0, DevicePlan("CPU", 1)),
        ("default", 0, 4, DevicePlan("GPU", 1)),
        ("mirrored", 0, 0, DevicePlan("CPU", 1)),
        ("mirrored", 3, 0, DevicePlan("CPU", 3)),
        ("mirrored", 0, 4, DevicePlan("GPU", 4)),
        ("mirrored", 2, 4, DevicePlan("GPU", 2)),
        ("multi_worker", 0, 0, DevicePlan("CPU", 1)),
        ("multi_worker", 1, 0, DevicePlan("CPU", 1)),
        ("multi_worker", 0, 2, DevicePlan("GPU", 2)),
    ],
)
def test_devices_are_chosen_by_strategy_and_machine(strategy, devices, gpus, expected):
    assert plan(strategy, devices, gpus) == expected


def test_more_gpus_than_there_are_is_refused():
    with pytest.raises(UsageError, match="use --devices=2 or less"):
        plan("mirrored", 3, 2)


def test_several_cpu_replicas_in_a_worker_are_refused():
    with pytest.raises(UsageError, match="start 2 times as many workers"):
        plan("multi_worker", 2, 0)


def test_gpus_are_made_visible_and_grow(monkeypatch):
    calls = []
    faked = [f"GPU {n}" for n in range(4)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: faked)
    monkeypatch.setattr(
        tf.config, "set_visible_devices", lambda gpus, kind: calls.append(("visible", gpus))
    )
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda gpu, on: calls.append((gpu, on))
    )
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", Mirrored)
    strategy = replicas.create("mirrored", 2, None)
    assert strategy.names == ["GPU:0", "GPU:1"]
    assert calls == [("visible", faked[:2]), ("GPU 0", True), ("GPU 1", True)]


def test_workers_that_see_the_same_gpus_divide_them():
    gpus = ["a", "b", "c", "d"]
    assert [replicas.own_part(gpus, part, 2) for part in (0, 1)] == [["a", "b"], ["c", "d"]]
    assert replicas.own_part(gpus, 0, 1) == gpus
    assert replicas.own_part([], 1, 3) == []


@pytest.mark.parametrize(("gpus", "parts"), [(4, 3), (2, 4)])
def test_gpus_that_cannot_be_divided_are_not_shared(gpus, parts):
    with pytest.raises(UsageError, match=f"{parts} workers of this host see the same {gpus} GPUs"):
        replicas.own_part(list(range(gpus)), 0, parts)


class Mirrored:
    _collective_key_base = 0

    def __init__(self, names):
        self.names = names


def test_another_choice_of_gpus_in_the_same_process_is_refused(monkeypatch):
    def initialized(*args):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU 0", "GPU 1"])
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["GPU 0", "GPU 1"])
    monkeypatch.setattr(tf.config, "set_visible_devices", initialized)
    with pytest.raises(UsageError, match="use a new process"):
        replicas.create("default", 0, None)


def test_more_logical_devices_in_the_same_process_are_refused():
    tf.config.list_logical_devices("CPU")  # initializes TensorFlow, with the four of these tests
    with pytest.raises(UsageError, match="fewer logical CPU devices"):
        replicas.create("mirrored", 64, None)
