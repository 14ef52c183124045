"""Which way the step's sum takes. The sums themselves: the tests of trajectories."""

import types

import pytest
import tensorflow as tf

import dist_train
from dist_train import mnist, reduction, replicas
from dist_train.build import Parts
from dist_train.workers import Workers


class Several(tf.distribute.MultiWorkerMirroredStrategy):
    """Described, not there: a second real one cannot be made in a process."""

    def __init__(self, replicas, devices):
        self.described = replicas, devices

    num_replicas_in_sync = property(lambda self: self.described[0])
    extended = property(lambda self: types.SimpleNamespace(worker_devices=self.described[1]))
    cluster_resolver = types.SimpleNamespace(task_id=0)


def ops(strategy, size):
    """The types of the operations that a reduction consists of."""
    total = reduction.of_vectors(strategy, size)
    concrete = tf.function(total, autograph=False).get_concrete_function(
        tf.TensorSpec([size], tf.float32)
    )
    return [op.type for op in concrete.graph.get_operations()]


CPU = ["/job:worker/replica:0/task:0/device:CPU:0"]


@pytest.mark.parametrize(
    ("replicas", "size"), [(2, 55_000), (2, 131_072), (8, 32_768), (9, 1000), (13, 1000)]
)
def test_workers_gather_what_is_short(replicas, size):
    worker = Several(replicas, CPU)
    assert ops(worker, size).count("CollectiveGatherV2") == 1
    assert "CollectiveReduceV2" not in ops(worker, size)


@pytest.mark.parametrize(
    ("replicas", "size"),
    [(6, 55_000), (8, 55_000), (12, 10), (1000, 55_000), (1000, 10_000_000)],
)
def test_many_workers_add_in_the_rows_of_a_grid_and_then_in_its_columns(replicas, size):
    worker = Several(replicas, CPU)
    assert ops(worker, size).count("CollectiveReduceV2") == 2
    assert "CollectiveGatherV2" not in ops(worker, size)


@pytest.mark.parametrize(
    ("workers", "expected"), [(1, (1, 1)), (6, (2, 3)), (7, (1, 7)), (36, (6, 6)), (1000, (25, 40))]
)
def test_the_grid_is_as_square_as_it_can_be(workers, expected):
    assert reduction.grid(workers) == expected


def test_every_worker_is_in_one_row_and_one_column_of_a_grid(monkeypatch):
    def groups(worker):
        monkeypatch.setattr(Several, "cluster_resolver", types.SimpleNamespace(task_id=worker))
        total = reduction.of_vectors(Several(12, CPU), 10)
        graph = tf.function(total, autograph=False).get_concrete_function(
            tf.TensorSpec([10], tf.float32)
        )
        found = [op for op in graph.graph.get_operations() if op.type == "CollectiveReduceV2"]
        return [
            (tf.get_static_value(op.inputs[1]), int(tf.get_static_value(op.inputs[2])))
            for op in found
        ]

    members = {}
    for worker in range(12):
        (columns, row), (rows, column) = groups(worker)
        assert (columns, rows) == (4, 3)
        members.setdefault(row, []).append(worker)
        members.setdefault(column, []).append(worker)
    in_rows = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert sorted(members.values()) == sorted([*in_rows, *map(list, zip(*in_rows, strict=True))])


@pytest.mark.parametrize(
    ("replicas", "size", "devices"),
    [
        (2, 131_073, CPU),
        (13, 55_000, CPU),
        (8, 1_000_000, CPU),
        (1000, 100_000_000, CPU),
        (2, 55_000, ["/job:worker/replica:0/task:0/device:GPU:0"]),
        (4, 1000, [f"/job:worker/replica:0/task:0/device:CPU:{n}" for n in range(2)]),
    ],
)
def test_all_else_is_left_to_the_strategy(replicas, size, devices):
    assert reduction.of_vectors(Several(replicas, devices), size) is reduction._reduced


def test_one_process_leaves_it_to_the_strategy():
    assert reduction.of_vectors(tf.distribute.get_strategy(), 10) is reduction._reduced


def test_tensors_of_all_shapes_travel_in_one_vector():
    shapes = [[3, 2], [], [5]]
    total = tf.function(reduction.make(Several(2, CPU), shapes), autograph=False)
    concrete = total.get_concrete_function([tf.TensorSpec(shape) for shape in shapes])
    sent = [op for op in concrete.graph.get_operations() if op.type.startswith("Collective")]
    assert [(op.type, op.inputs[0].shape) for op in sent] == [("CollectiveGatherV2", [12])]
    assert [output.shape for output in concrete.outputs] == shapes


def mirrored(devices):
    config = dist_train.Config(strategy="mirrored", devices=devices, jit_compile="false")
    strategy = replicas.create(config.strategy, config.devices, None)
    return Parts(
        mnist.task(config), config, strategy, Workers(strategy, None, stall_timeout_s=60.0)
    )


def step_of(devices):
    """(nodes of a call of the training loop and of a line, those of a step, of all functions)"""
    parts = mirrored(devices)
    inputs = parts.inputs["train"]
    numbers = [tf.constant(number) for number in (0, 1, 200, 0.0)]
    loop = parts.train_loop._run.get_concrete_function(
        inputs.data, next(inputs.chunks(0)), *numbers
    )
    graph = loop.graph.as_graph_def()
    functions = {f.signature.name: f.node_def for f in graph.library.function}
    [line] = bodies(graph.node)
    [step] = bodies(functions[line])
    call = [*graph.node, *functions[line]]
    return call, functions[step], [n for nodes in functions.values() for n in nodes]


def bodies(nodes):
    """The names of the functions that loops among these nodes repeat."""
    return [n.attr["body"].func.name for n in nodes if n.op in ("While", "StatelessWhile")]


def collectives(nodes):
    return [n.op for n in nodes if n.op.startswith("Collective") and "Communicator" not in n.op]


@pytest.mark.parametrize("devices", [2, 3])
def test_a_step_has_one_collective_on_each_replica_and_a_call_no_other(devices, monkeypatch):
    monkeypatch.setattr(reduction, "_is_cpu", lambda device: False)  # as between GPUs
    call, step, functions = step_of(devices)
    assert collectives(call) == []
    assert collectives(step) == ["CollectiveReduceV2"] * devices
    assert len(collectives(functions)) == devices


@pytest.mark.parametrize("devices", [2, 3])
def test_in_one_memory_a_step_adds_each_tensor_once_and_nothing_travels(devices):
    call, step, functions = step_of(devices)
    assert collectives(call) == collectives(functions) == []
    weights = 2 * len(mnist.task(dist_train.Config()).model().layers) - 2
    added = [n for n in step if n.op == "AddN"]
    assert [n.attr["N"].i for n in added] == [devices] * (weights + 1)


def test_both_ways_add_the_same(monkeypatch):
    strategy = replicas.create("mirrored", 3, None)
    values = [tf.range(6.0), tf.constant([[1.5], [2.0]])]

    def sums():
        total = reduction.make(strategy, [[6], [2, 1]])

        @tf.function(autograph=False)
        def run():
            def replica():
                number = tf.distribute.get_replica_context().replica_id_in_sync_group
                found = total([value + tf.cast(number, tf.float32) for value in values])
                return [tf.identity(each) for each in found]

            return strategy.run(replica)

        return [
            [part.numpy().tolist() for part in strategy.experimental_local_results(each)]
            for each in run()
        ]

    together = sums()
    assert together == [[[3.0 * n + 3 for n in range(6)]] * 3, [[[7.5], [9.0]]] * 3]
    monkeypatch.setattr(reduction, "_is_cpu", lambda device: False)
    assert sums() == together


def test_a_reduction_is_timed_with_numbers_that_no_compiler_knows(monkeypatch):
    loop, seen = mirrored(2).train_loop, []
    reduce = loop._reduce

    def watched(tensors):
        seen.append([tensor.op.type for tensor in tensors])
        return reduce(tensors)

    monkeypatch.setattr(loop, "_reduce", watched)
    assert loop.time_reduction() > 0.0
    for *weights, signals in seen:
        assert len(weights) == 6
        assert set(weights) == {"ReadVariableOp"}
        assert signals in ("Const", "Fill")
    assert len(seen) == 2
