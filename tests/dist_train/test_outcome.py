"""What a finished run leaves behind: the report, and the pictures in it and in TensorBoard."""

import base64
import dataclasses
import html.parser
import io
import logging as python_logging
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from matplotlib import image

import dist_train
from dist_train import pictures, report
from dist_train.mnist import files, mlp
from dist_train.rows import read_rows

RNG = np.random.default_rng(0)
STRATEGIES = {"default": {}, "mirrored": {"strategy": "mirrored", "devices": 2}}


def classifier():
    (x, y), _ = files.read(None)
    return dist_train.Task(
        model=mlp,
        train=dist_train.Arrays(x[:200], y[:200]),
        validation=dist_train.Arrays(x[200:300], y[200:300]),
        test=dist_train.Arrays(x[300:403], y[300:403]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
        preprocess=lambda x, y, seed: (tf.cast(x, tf.float32) / 255.0, y),
    )


def regression():
    x = np.linspace(0, 1, 64, dtype=np.float32)[:, None]
    return dist_train.Task(
        model=lambda: keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]),
        train=dist_train.Arrays(x, 3.0 * x[:, 0]),
        loss=lambda y, outputs: tf.square(outputs[:, 0] - y),
    )


def train(workdir, task=classifier, **settings):
    values = {"epochs": 1, "learning_rate": 0.1, "log_steps": 2, "workdir": str(workdir)}
    return dist_train.train(task, dist_train.Config(**(values | settings)))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of the classifier: 4 epochs of 4 steps, and what was said."""

    settings: dict
    result: Any
    folder: Path
    said: list[str]

    @property
    def page(self):
        return (self.folder / "report.html").read_text()


@pytest.fixture(scope="module", params=STRATEGIES)
def run(request, tmp_path_factory):
    settings, said = STRATEGIES[request.param], []
    folder = tmp_path_factory.mktemp(request.param) / "run"
    handler, verbosity = python_logging.Handler(), logging.get_verbosity()
    handler.emit = lambda record: said.append(record.getMessage())
    python_logging.getLogger("absl").addHandler(handler)
    logging.set_verbosity(logging.INFO)
    try:
        # As many steps as an epoch has warm up; a tenth from half of the others on.
        schedule = {"lr_schedule": "step", "warmup_steps": 4, "log_steps": 1}
        result = train(folder, epochs=4, **schedule, **settings)
    finally:
        logging.set_verbosity(verbosity)
        python_logging.getLogger("absl").removeHandler(handler)
    return Run(settings, result, folder, said)


def pictures_of(page):
    return {
        title: base64.b64decode(data)
        for title, data in re.findall(r'<img alt="(.*?)" src="data:image/png;base64,(.*?)"', page)
    }


def events(workdir):
    for file in sorted((Path(workdir) / "tensorboard").glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                yield event.step, value


def assert_shows_something(png):
    pixels = image.imread(io.BytesIO(png))[:, :, :3]
    assert np.mean(pixels < 0.9) > 0.01, "an empty picture"


class Links(html.parser.HTMLParser):
    """Everything that a browser would load or go to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]
        self.found += [tag] if tag in ("script", "link", "iframe") else []


def test_the_report_tells_all_and_opens_offline(run):
    result, page = run.result, run.page
    links = Links()
    links.feed(page)
    assert links.found
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert "http" not in page
    assert "url(" not in page

    for kind in ("train", "validation", "test"):
        assert f"{result.metrics[kind]['accuracy']:.4f}" in page
    devices = "2 CPU devices" if run.settings else "1 CPU device"
    for text in ("best-00000016", "warmup_steps", tf.__version__, devices):
        assert text in page
    assert "<td>learning_rate</td><td>0.1</td><td>0.001</td>" in page
    assert "batch_size" not in page  # it has its default
    found = pictures_of(page)
    assert list(found) == ["Curves", "Confusion matrix", "Worst mistakes"]
    assert found["Curves"] == (run.folder / "curves.png").read_bytes()
    for png in found.values():
        assert_shows_something(png)
    right = round(103 * result.metrics["test"]["accuracy"])
    assert f"103 test examples, {right} of them right" in page


def test_tensorboard_gets_the_pictures_of_the_report(run):
    images = [(step, value) for step, value in events(run.folder) if value.image.width]
    shown = {value.tag: (step, value.image) for step, value in images}
    page = pictures_of(run.page)
    for tag, title in (("confusion", "Confusion matrix"), ("worst_mistakes", "Worst mistakes")):
        step, picture = shown[f"test/{tag}"]
        assert step == 16
        assert picture.encoded_image_string == page[title]
        height, width = image.imread(io.BytesIO(page[title])).shape[:2]
        assert (picture.height, picture.width) == (height, width)


def test_tensorboard_gets_the_rate_and_where_the_time_went_and_the_settings(run):
    values: dict[str, dict[int, float]] = {}
    plugins = {}
    for step, value in events(run.folder):
        values.setdefault(value.tag, {})[step] = value.simple_value
        plugins[value.tag] = value.metadata.plugin_data
    rates = values["train/learning_rate"]
    assert list(rates) == list(range(1, 17))
    assert rates[2] == pytest.approx(0.05)
    assert rates[5] == pytest.approx(0.1)
    assert rates[12] == pytest.approx(0.01)
    assert list(values["train/gradient_norm"]) == list(rates)
    for name in ("input", "evaluation", "saving", "compute"):
        shares = values[f"train/time_in_{name}"]
        assert list(shares) == list(rates)
        assert 0 < max(shares.values()) <= 1
        assert min(shares.values()) >= 0
    communication = values["train/time_in_communication"]
    assert list(communication) == list(rates)
    assert (min(communication.values()) > 0) == ("devices" in run.settings)
    plugin = plugins["_hparams_/session_start_info"]
    assert plugin.plugin_name == "hparams"
    assert b"learning_rate" in plugin.content


def test_the_first_lines_say_what_runs_where_and_the_last_where_all_lies(run):
    settings, said = run.settings, run.said
    devices = "2 CPU devices" if settings else "1 CPU device"
    versions, where, batch, *_ = said[0].splitlines()
    assert f"tensorflow {tf.__version__}" in versions
    assert where.startswith(
        f"strategy {settings.get('strategy', 'default')}, 1 worker, {devices} ("
    )
    assert batch.startswith("batch 64 = 2 x 32" if settings else "batch 64 = 1 x 64")
    last = re.fullmatch(r"done in [\d.]+ s: (.*) holds (.*)", said[-1])
    assert last[1] == str(run.folder)
    for name in re.sub(r"\(.*?\)", "", last[2]).split(","):
        assert (run.folder / name.strip()).exists(), name
    assert "checkpoints/ (the best is best-00000016)" in last[2]
    assert (run.folder / "checkpoints" / "best-00000016").is_dir()


def test_averaged_weights_are_the_ones_looked_at(workdir):
    result = train(workdir, ema=0.9, epochs=3)
    right = round(103 * result.metrics["test"]["accuracy"])
    page = (Path(workdir) / "report.html").read_text()
    assert f"103 test examples, {right} of them right" in page


def test_a_task_that_is_no_classification_has_the_curves_alone(workdir):
    train(workdir, regression)
    page = (Path(workdir) / "report.html").read_text()
    assert list(pictures_of(page)) == ["Curves"]


def test_what_the_page_says_is_escaped(tmp_path):
    path = tmp_path / "report.html"
    odd = "<script>alert(1)</script>&"
    said = report.Report(
        title=odd, metrics={odd: {odd: 1.0}}, summary={odd: odd}, settings={odd: (odd, None)},
        environment={odd: odd}, pictures=[report.Picture(odd, odd, b"")],
    )  # fmt: skip
    report.write(said, path)
    assert "<script>" not in path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "picture",
    [
        RNG.integers(0, 255, (28, 28), np.uint8),
        RNG.normal(size=(300, 20, 1)),
        RNG.normal(size=(8, 8, 3)).astype(np.float32) * 1e6,
        RNG.integers(0, 2, (16, 16, 4)) * 1000,
        np.full((8, 8), np.nan),
    ],
    ids=["bytes", "long", "colours", "with alpha", "not finite"],
)
def test_pictures_of_any_range_are_shown(picture):
    assert_shows_something(pictures.grid([picture] * 7, ["0: 1 as 2, 50%"] * 7))


@pytest.mark.parametrize("classes", [2, 20, 200])
def test_a_confusion_of_any_size_is_shown(classes):
    assert_shows_something(pictures.confusion(np.eye(classes, dtype=np.int64) * 1000))


def test_a_resumed_run_reports_all_of_it(workdir):
    train(workdir)
    train(workdir, epochs=2)
    page = (Path(workdir) / "report.html").read_text()
    assert "<td>8 of 8, 4 per epoch</td>" in page
    assert len(read_rows(Path(workdir) / "metrics.jsonl")) == 7


def test_exports_that_cannot_be_written_lose_nothing(workdir, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dist_train.export.write", full)
        with pytest.raises(dist_train.RunError, match=r"is finished and saved, but.*No space left"):
            train(workdir)
    again = train(workdir)
    assert again.metrics["validation"]["accuracy"] == pytest.approx(
        read_rows(Path(workdir) / "metrics.jsonl")[-2]["accuracy"]
    )
    assert (Path(workdir) / "report.html").exists()


def test_a_remote_workdir_gets_all_of_it(tmp_path):
    train(f"file://{tmp_path}/run")
    assert "Worst mistakes" in (tmp_path / "run" / "report.html").read_text()
    assert {"test/confusion", "test/worst_mistakes"} <= {v.tag for _, v in events(tmp_path / "run")}
