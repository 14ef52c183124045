"""TensorFlow once for all tests of a session: on CPU, split into four logical devices."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.pop("TF_CONFIG", None)

import pytest
import tensorflow as tf

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
