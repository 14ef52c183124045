"""Several worker processes: the same numbers as one, and clear ends."""

import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from trajectory import STEPS, assert_same_run, steps, wait_for_step, weights
from trajectory import TRAIN as PACED

from dist_train import reduction
from dist_train.rows import read_rows

HERE = Path(__file__).parent


def of_small(name):
    return f"{HERE / 'small.py'}:{name}"


SMALL = of_small("task")
TRAIN = ["-m", "dist_train", f"--task={SMALL}"]


CASES = {
    f"{name}-{mode}": {"task": SMALL, "epochs": 2, "log_steps": 1, "input": mode, **settings}
    for mode in ("resident", "stream")
    for name, settings in {
        "sgd": {"learning_rate": 0.1},
        "sgd-clipped-partial": {"learning_rate": 0.5, "clip_norm": 0.3, "batch_size": 50},
        "adam": {"optimizer": "adam", "batch_size": 100},
        "adam-clipped": {"optimizer": "adam", "clip_norm": 0.5},
    }.items()
} | {
    name: {"task": SMALL, "epochs": 2, "log_steps": 1, **settings}
    for name, settings in {
        "augmented": {
            "task": of_small("moving"), "augment_shift": 2, "augment_zoom": 0.1,
            "augment_flip": True, "learning_rate": 0.1,
        },
        "early-stopping": {
            "task": of_small("noisy"), "optimizer": "adam", "learning_rate": 0.01, "epochs": 30,
            "early_stopping": 2,
        },
        "mixed": {"dtype": "mixed_bfloat16", "learning_rate": 0.02},
        "features": {
            "optimizer": "nadam", "learning_rate": 0.02, "scale_lr": 128, "lr_schedule": "cosine",
            "warmup_steps": 5, "weight_decay": 0.1, "ema": 0.9, "label_smoothing": 0.1,
            "gradient_accumulation": 2,
        },
    }.items()
}  # fmt: skip
COARSE = {"rtol": 2e-2, "atol": 2e-3}
TOLERANCES = {"mixed": {"loss": COARSE, "weight": COARSE}}  # bfloat16 has 8 bits


@pytest.fixture(scope="module")
def one_process(new_group, tmp_path_factory):
    """Each case by one process: the folder that holds its workdirs."""
    folder = tmp_path_factory.mktemp("one")
    group = new_group(folder)
    group.start([HERE / "many_runs.py", json.dumps(CASES)])
    assert group.wait(240) == [0], group.output(0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_follow_the_trajectory_of_one_process(group, tmp_path, one_process, workers):
    cases = {name: {**settings, "strategy": "multi_worker"} for name, settings in CASES.items()}
    group.start_all(workers, [HERE / "many_runs.py", json.dumps(cases)])
    assert group.wait(400) == [0] * workers, group.output(0)
    for name in CASES:
        assert_same_run(tmp_path / name, one_process / name, **TOLERANCES.get(name, {}))
    assert max(steps(one_process / "early-stopping")) < 30 * 16


@pytest.mark.slow
def test_six_workers_that_add_in_two_rings_follow_the_trajectory_of_one_process(
    group, tmp_path, one_process
):
    name = "adam-clipped-resident"
    settings = {**CASES[name], "strategy": "multi_worker"}
    weights_and_sums = sum(each.size for each in weights(one_process / name))
    assert reduction.grid(6) == (2, 3)
    assert 6 * 4 * weights_and_sums > 1 << 20
    group.start_all(6, [HERE / "many_runs.py", json.dumps({name: settings})])
    assert group.wait(240) == [0] * 6, group.output(0)
    assert_same_run(tmp_path / name, one_process / name)


@pytest.mark.slow
def test_workers_that_stream_keep_step_with_those_that_do_not(group, tmp_path, addresses):
    command = ["-m", "dist_train", f"--task={of_small('large')}", "--batch_size=4", "--epochs=2"]
    # Where streamed a chunk is 8 steps of 11 and of 10; a call, and an evaluation, ends with one.
    command += ["--eval_epochs=1", "--log_steps=1", "--learning_rate=0.1", "--steps_per_loop=1000"]
    group.start([*command, "--workdir=one"])
    assert group.wait() == [0], group.output(0)
    group.next_round()
    command += ["--strategy=multi_worker", "--workdir=two", "--stall_timeout_s=30"]
    cluster = addresses(2)
    for index, mode in enumerate(("resident", "stream")):
        group.start([*command, f"--input={mode}"], cluster, index)
    assert group.wait() == [0, 0], group.output(0) + group.output(1)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_the_steps_that_the_chief_profiles_are_calls_of_all(group, tmp_path):
    command = [*TRAIN, "--epochs=1", "--profile_steps=3,5", "--steps_per_loop=1000"]
    group.start_all(
        2, [*command, "--strategy=multi_worker", "--workdir=run", "--stall_timeout_s=30"]
    )
    assert group.wait() == [0, 0], group.output(0) + group.output(1)
    assert list((tmp_path / "run" / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.slow
def test_workers_leave_together_without_a_word_about_unhealthy_peers(group):
    command = [*TRAIN, "--strategy=multi_worker", "--workdir=run", "--epochs=1"]
    group.start_all(2, command)
    assert group.wait() == [0, 0]
    for index in range(2):
        assert "unhealthy" not in group.output(index)
        assert "Traceback" not in group.output(index)


@pytest.mark.slow
def test_the_chief_alone_looks_for_mistakes_also_where_there_are_batch_statistics(group, tmp_path):
    command = ["-m", "dist_train", f"--task={HERE / 'small.py'}:normalized", "--ema=0.9"]
    settings = ["--batch_size=50", "--epochs=2", "--learning_rate=0.1"]
    group.start_all(2, [*command, *settings, "--strategy=multi_worker", "--workdir=run"])
    assert group.wait() == [0, 0], group.output(0) + group.output(1)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    (accuracy,) = [row["accuracy"] for row in rows if row["kind"] == "test"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"197 test examples, {round(197 * accuracy)} of them right" in page
    assert "Worst mistakes" in page


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_at_one_step_and_they_resume_elsewhere(
    group, tmp_path, whole_run
):
    workers = group.start_all(2, [*PACED, "--strategy=multi_worker", "--workdir=run"])
    wait_for_step(tmp_path / "run", 300, *workers)
    workers[1].send_signal(signal.SIGTERM)
    assert group.wait(60) == [75, 75], group.output(0) + group.output(1)
    (step,) = {
        int(re.search(r"after step ([\d,]*\d)", text)[1].replace(",", ""))
        for text in map(group.output, (0, 1))
    }
    assert 300 <= step < STEPS
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()

    # On from there on another strategy.
    group.next_round()
    group.start([*PACED, "--strategy=mirrored", "--devices=3", "--workdir=run"])
    assert group.wait(200) == [0], group.output(0)
    assert f"resumed after step {step:,}" in group.output(0)
    assert_same_run(tmp_path / "run", whole_run)


@pytest.mark.slow
def test_a_killed_worker_ends_its_peer_with_a_reason_and_nothing_is_lost(
    group, tmp_path, whole_run
):
    workers = group.start_all(2, [*PACED, "--strategy=multi_worker", "--workdir=run"])
    wait_for_step(tmp_path / "run", 300, *workers)
    workers[1].kill()
    assert workers[0].wait(30) == 1
    (line,) = [line for line in group.output(0).splitlines() if line.startswith("error")]
    assert re.search(r"steps \d+ to \d+: worker 1 \(127\.0\.0\.1:\d+\) was lost \(", line)
    assert "Traceback" not in group.output(0)

    group.next_round()
    group.start([*PACED, "--workdir=run"])
    assert group.wait(200) == [0], group.output(0)
    assert "resumed after step" in group.output(0)
    assert_same_run(tmp_path / "run", whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_to_one_of_six_workers_in_two_rings_ends_all(group, tmp_path, sent):
    """Those too that are neither in its row nor in its column."""
    settings = ["--epochs=1000", "--log_steps=50", "--eval_epochs=0"]
    command = [*TRAIN, "--strategy=multi_worker", "--workdir=run", *settings]
    workers = group.start_all(6, command)
    wait_for_step(tmp_path / "run", 100, *workers)
    workers[4].send_signal(sent)
    others = [0, 1, 2, 3, 5]
    if sent == signal.SIGTERM:
        assert group.wait(60) == [75] * 6, group.output(0)
        steps = {re.search(r"after step ([\d,]*\d)", group.output(index))[1] for index in range(6)}
        assert len(steps) == 1
        return
    assert [workers[index].wait(60) for index in others] == [1] * 5
    for index in others:
        (line,) = [each for each in group.output(index).splitlines() if each.startswith("error")]
        assert re.search(r"worker 4 \(127\.0\.0\.1:\d+\).* was lost \(", line)


@pytest.mark.slow
def test_an_operation_that_fails_on_one_worker_is_told_there_and_its_peer_names_it(group):
    task = f"--task={HERE / 'small.py'}:checked"
    command = ["-m", "dist_train", task, "--strategy=multi_worker", "--jit_compile=false"]
    group.start_all(2, [*command, "--workdir=run"])
    assert group.wait(60) == [1, 1]
    (own,), (peers,) = (
        [line for line in group.output(index).splitlines() if line.startswith("error")]
        for index in (1, 0)
    )
    assert re.fullmatch(r"error: steps \d+ to \d+: assertion failed: .*a label of mine.*", own)
    assert re.search(r"worker 1 \(127\.0\.0\.1:\d+\) was lost", peers)


def wait_for_listener(address, timeout_s=30):
    host, port = address.split(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((host, int(port))).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_missing_worker_is_named_within_the_bound(group, addresses):
    cluster = addresses(3)
    begin = time.monotonic()
    command = [*TRAIN, "--strategy=multi_worker", "--workdir=run", "--start_timeout_s=4"]
    group.start(command, cluster, 0)
    wait_for_listener(cluster[0])
    group.start(command, cluster, 1)
    assert group.wait(30) == [1, 1]
    assert time.monotonic() - begin < 30
    for index in (0, 1):
        (line,) = group.output(index).splitlines()
        assert f"worker 2 ({cluster[2]}) never arrived" in line


def test_a_missing_chief_is_named_within_the_bound(group, addresses):
    cluster = addresses(2)
    command = [*TRAIN, "--strategy=multi_worker", "--workdir=run", "--start_timeout_s=2"]
    group.start(command, cluster, 1)
    assert group.wait(30) == [1]
    assert f"the chief, worker 0 ({cluster[0]}), never arrived" in group.output(0)


def test_a_worker_that_waits_for_its_peers_obeys_a_signal(group, addresses):
    command = [*TRAIN, "--strategy=multi_worker", "--workdir=run"]
    cluster = addresses(2)
    host, port = cluster[0].split(":")
    with socket.create_server((host, int(port))) as chief:
        chief.settimeout(60)
        worker = group.start(command, cluster, 1)
        connection, _ = chief.accept()
        with connection:
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(30) == 75
    assert "before the first step" in group.output(0)


def test_workers_that_disagree_on_a_flag_are_told_which(group, addresses):
    cluster = addresses(2)
    command = [*TRAIN, "--strategy=multi_worker", "--workdir=run"]
    group.start([*command, "--batch_size=64"], cluster, 0)
    group.start([*command, "--batch_size=32"], cluster, 1)
    assert group.wait(30) == [2, 2]
    for index in (0, 1):
        assert "disagree on batch_size: 64 and 32" in group.output(index)


@pytest.mark.slow
def test_workers_that_hold_other_data_are_told_whose(group):
    task = f"--task={HERE / 'small.py'}:own_data"
    group.start_all(2, ["-m", "dist_train", task, "--strategy=multi_worker", "--workdir=run"])
    assert 2 in group.wait(60)
    both = group.output(0) + group.output(1)
    assert "worker 1 (" in both
    assert "has other train examples" in both
    assert "Traceback" not in both


def test_a_port_that_is_taken_is_named(group, addresses):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        own = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [*TRAIN, "--strategy=multi_worker", "--workdir=run", "--start_timeout_s=5"]
        group.start(command, [own, *addresses(1)], 0)
        assert group.wait(30) == [1]
    assert f"cannot listen on its own address {own}" in group.output(0)
