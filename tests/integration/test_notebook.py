"""A notebook: cells in a real Jupyter kernel train, train again, and go on."""

import pytest

pytest.importorskip("ipykernel", reason="a notebook needs ipykernel")
nbclient = pytest.importorskip("nbclient", reason="a notebook needs nbclient")
nbformat = pytest.importorskip("nbformat")

DEFINITIONS = """
import absl.logging, dist_train, keras
import numpy as np

x = np.linspace(0, 1, 64, dtype=np.float32)[:, None]

def task():
    return dist_train.Task(
        model=lambda: keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]),
        train=dist_train.Arrays(x, 3 * x[:, 0]),
        loss=lambda y, outputs: (outputs[:, 0] - y) ** 2,
    )

def train(workdir, **settings):
    config = dist_train.Config(workdir=workdir, learning_rate=0.1, batch_size=16, **settings)
    result = dist_train.train(task, config)
    return result.step, result.metrics["train"]["loss"]
"""
REFUSED = """
try:
    train("a", epochs=3, seed=5)
except dist_train.UsageError as error:
    print(error)
"""
LOGGED = """
absl.logging.set_verbosity(absl.logging.INFO)
train("a", epochs=3)
"""


def run(folder, *cells):
    """[outputs of each cell] of a notebook in a folder."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": folder}}
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=resources
    ).execute()
    return [cell.outputs for cell in notebook.cells]


def value(outputs):
    (found,) = [each.data["text/plain"] for each in outputs if each.output_type == "execute_result"]
    return found


def text(outputs, name):
    return "".join(each.text for each in outputs if each.get("name") == name)


@pytest.mark.slow
def test_cells_train_twice_and_go_on_in_one_kernel(tmp_path, monkeypatch):
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):  # not the user's own
        monkeypatch.setenv(name, str(tmp_path / name))
    _, first, second, refused, logged = run(
        tmp_path, DEFINITIONS, 'train("a", epochs=2)', 'train("b", epochs=2)', REFUSED, LOGGED
    )
    assert value(first) == value(second)
    assert value(first).startswith("(8, ")
    assert "seed=5 (was 0)" in text(refused, "stdout")
    assert value(logged).startswith("(12, ")
    assert "resumed after step 8" in text(logged, "stderr")
    assert (tmp_path / "a" / "report.html").exists()
