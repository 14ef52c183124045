"""What a worker says and does when its peers are gone; that they are: the integration tests."""

import pytest
import tensorflow as tf

from dist_train import watchdog, workers
from dist_train.cluster import Cluster
from dist_train.errors import RunError, WorkerLost

LOST = "Collective ops is aborted by: Connection reset, from /job:worker/replica:0/task:1"


def of(count):
    addresses = tuple(f"n{index}:2222" for index in range(count))
    strategy = tf.distribute.get_strategy()
    return workers.Workers(strategy, Cluster(addresses, 0), stall_timeout_s=60.0)


@pytest.fixture
def pauses(monkeypatch):
    """(seconds, bounds that run meanwhile) of each."""
    found = []
    monkeypatch.setattr(
        workers.time, "sleep", lambda seconds: found.append((seconds, [*watchdog._watch._waits]))
    )
    return found


@pytest.mark.parametrize(("count", "expected"), [(2, []), (3, [(watchdog.LINGER_S, [])])])
def test_who_loses_a_peer_stays_for_those_that_hear_of_it_from_him(pauses, count, expected):
    with (
        pytest.raises(
            WorkerLost, match=r"step 7: worker 1 \(n1:2222\) was lost \(Connection reset"
        ),
        of(count).together("step 7"),
    ):
        raise tf.errors.UnavailableError(None, None, LOST)
    assert pauses == expected


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (
            "Error reported from /job:worker/replica:0/task:2: The following tasks are unhealthy"
            " (stopped sending heartbeats):\n/job:worker/replica:0/task:1\nThe tasks have crashed.",
            r"worker 1 \(n1:2222\)",
        ),
        (
            "Error reported from /job:worker/replica:0/task:2: Shutdown barrier has failed.",
            r"worker 2 \(n2:2222\)",
        ),
    ],
)
def test_who_reports_a_loss_is_not_the_one_that_is_lost(pauses, message, name):
    with pytest.raises(WorkerLost, match=f"^step 7: {name} was lost"), of(3).together("step 7"):
        raise tf.errors.UnavailableError(None, None, message)


def test_who_fails_by_himself_has_nobody_to_stay_for(pauses):
    with pytest.raises(RunError, match=r"^step 7: a label of mine$"), of(3).together("step 7"):
        raise tf.errors.InvalidArgumentError(None, None, "a label of mine")
    assert pauses == []
