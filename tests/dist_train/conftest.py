"""TensorFlow once for all tests of a session: on CPU, split into four logical devices."""

import os
import signal
import threading

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.pop("TF_CONFIG", None)

import pytest
import tensorflow as tf

from dist_train import stopping

DEVICES = 4

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * DEVICES
)


@pytest.fixture
def workdir(tmp_path):
    """A folder of its own for a run, as a string."""
    return str(tmp_path / "run")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def stops_at(monkeypatch):
    """fn(n) -> a preprocess that sends this process SIGTERM in the n-th batch of training.

    The batch goes on when the run has heard of it.
    """
    heard = threading.Event()
    arrived = stopping.StopRequest._arrived

    def hear(request, number):
        arrived(request, number)
        heard.set()

    monkeypatch.setattr(stopping.StopRequest, "_arrived", hear)

    def preprocess_of(batch):
        seen = []

        def count():
            seen.append(batch)
            if len(seen) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
                assert heard.wait(30)

        def preprocess(x, y, seed):
            if seed is not None:
                tf.py_function(count, [], [])
            return x, y

        return preprocess

    return preprocess_of
