import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train import Config, UsageError
from dist_train.workdir import Workdir

_ROOT = Path(__file__).parents[2]
_TRAJECTORY = Config().trajectory()
TASK = {"loss": "mse", "optimizer": "sgd"}


def _written(folder) -> Workdir:
    folder.mkdir(exist_ok=True)
    workdir = Workdir(folder)
    workdir.write_config(_TRAJECTORY, {"python": "3.11"}, TASK)
    return workdir


def test_missing_folders_are_made(tmp_path):
    with Workdir.locked(str(tmp_path / "a" / "b")) as workdir:
        assert workdir.path == tmp_path / "a" / "b"
        assert workdir.path.is_dir()


def test_the_default_is_named_after_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Workdir.locked(None) as workdir:
        assert re.fullmatch(r"runs/\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ", str(workdir.path))
        assert workdir.path.is_dir()


def test_two_runs_of_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 0, 0, 0)))
    paths = []
    for _ in range(3):
        with Workdir.locked(None) as workdir:
            paths.append(str(workdir.path))
    name = "runs/2026-01-02T03-04-05Z"
    assert paths == [name, f"{name}-2", f"{name}-3"]


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with (
        pytest.raises(UsageError, match=r"workdir=runs/.* cannot be written"),
        Workdir.locked(None),
    ):
        pass


def test_a_missing_folder_is_not_made_to_be_evaluated(tmp_path):
    folder = tmp_path / "none"
    with (
        pytest.raises(UsageError, match="does not exist"),
        Workdir.locked(str(folder), create=False),
    ):
        pass
    assert not folder.exists()


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    first = Workdir.locked(str(tmp_path))
    with first, pytest.raises(UsageError, match="in use by another"), Workdir.locked(str(tmp_path)):
        pass
    with Workdir.locked(str(tmp_path)):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = (
        "import sys, time\n"
        "from dist_train.workdir import Workdir\n"
        "with Workdir.locked(sys.argv[1]):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="in use"), Workdir.locked(str(tmp_path)):
            pass
        process.kill()
        process.wait(timeout=10)
    with Workdir.locked(str(tmp_path)):
        pass


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_its_place_is_an_error(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / below
    with (
        pytest.raises(UsageError, match=r"cannot be written: .*; use another --workdir"),
        Workdir.locked(str(path)),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_an_error():
    with (
        pytest.raises(UsageError, match="workdir=/proc/run cannot be written"),
        Workdir.locked("/proc/run"),
    ):
        pass


def test_the_same_settings_are_resumed(tmp_path):
    _written(tmp_path).check_resumable(_TRAJECTORY)


def test_a_new_folder_is_resumable(tmp_path):
    Workdir(tmp_path).check_resumable(_TRAJECTORY)


def test_a_remote_run_is_compared_as_it_is_now(tmp_path):
    with Workdir.locked(f"file://{tmp_path}/run") as workdir:
        workdir.check_resumable(_TRAJECTORY)
        there = _written(tmp_path / "run")
        workdir.check_resumable(_TRAJECTORY)
        there.write_config(Config(seed=3).trajectory(), {}, {})
        with pytest.raises(UsageError, match=r"seed=0 \(was 3\)"):
            workdir.check_resumable(_TRAJECTORY)
        there.config.unlink()
        workdir.check_resumable(_TRAJECTORY)


def test_a_remote_file_appears_whole(tmp_path, monkeypatch):
    """A follower reads config.json while the chief writes it anew."""
    there = tmp_path / "run" / "config.json"
    copy = tf.io.gfile.copy
    seen = []

    def torn(source, target, overwrite):
        Path(target.removeprefix("file://")).write_text("{")
        seen.append(there.read_text())
        copy(source, target, overwrite=overwrite)

    _written(there.parent)
    before = there.read_text()
    with Workdir.locked(f"file://{there.parent}") as workdir:
        workdir.write_config({"seed": 9}, {}, {})
        monkeypatch.setattr(tf.io.gfile, "copy", torn)
        workdir.push()
    assert seen == [before]
    assert json.loads(there.read_text())["config"] == {"seed": 9}
    assert [path.name for path in there.parent.iterdir()] == ["config.json"]


def test_a_chief_neither_fetches_nor_pushes_the_rows_of_a_follower(tmp_path):
    rows = tmp_path / "run" / "follow.jsonl"
    rows.parent.mkdir()
    rows.write_text("older")
    with Workdir.locked(f"file://{rows.parent}") as chief:
        rows.write_text("newer")
        chief.push()
        assert rows.read_text() == "newer"
        chief.fetch(chief.followed)
        assert chief.followed.read_text() == "newer"


def test_other_settings_are_all_named(tmp_path):
    other = Config(seed=3, batch_size=32, weight_decay=0.1).trajectory()
    with pytest.raises(UsageError, match="holds a run with other settings") as caught:
        _written(tmp_path).check_resumable(other)
    for part in ("seed=3 (was 0)", "batch_size=32 (was 64)", "weight_decay=0.1 (was None)"):
        assert part in str(caught.value)
    assert "model" not in str(caught.value)


def test_a_setting_of_a_newer_version_does_not_hinder(tmp_path):
    _written(tmp_path).check_resumable(_TRAJECTORY | {"new": 1})


def test_config_is_whole_with_its_versions(tmp_path):
    workdir = _written(tmp_path)
    saved = json.loads(workdir.config.read_text())
    assert saved == {"config": _TRAJECTORY, "versions": {"python": "3.11"}, "task": TASK}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_failed_write_leaves_the_old_config(tmp_path, monkeypatch):
    workdir = _written(tmp_path)
    before = workdir.config.read_text()

    def full(path, text):
        path.open("w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        workdir.write_config(Config(seed=9).trajectory(), {}, {})
    assert workdir.config.read_text() == before


def test_what_the_task_was_is_compared_with_what_it_is(tmp_path):
    workdir = _written(tmp_path)
    assert workdir.changed(TASK) == []
    assert workdir.changed({"optimizer": "adam", "more": "x"}) == ["loss", "optimizer", "more"]


@pytest.mark.parametrize("known", ["", ', "task": []', ', "task": {}', ', "task": null'])
def test_nothing_is_compared_with_what_an_older_version_did_not_know(tmp_path, known):
    workdir = _written(tmp_path)
    workdir.config.write_text('{"config": {}' + known + "}")
    assert workdir.changed(TASK) == []


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["config", "seed", "model", "x"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(
    st.binary(max_size=30)
    | st.sampled_from([b"[" * 100_000, b"9" * 5000, b'{"config": ["seed"]}', b'{"config": "seed"}'])
    | _JSON.map(lambda value: json.dumps(value).encode())
    | _JSON.map(lambda value: json.dumps({"config": value}).encode())
)
def test_any_config_file_is_compared_or_an_error(tmp_path, raw):
    workdir = Workdir(tmp_path)
    workdir.config.write_bytes(raw)
    try:
        workdir.check_resumable(_TRAJECTORY)
    except UsageError as error:
        message = str(error)
    else:
        message = ""
    if not message:  # then nothing in it contradicts
        saved = json.loads(raw)["config"]
        assert all(saved[name] == _TRAJECTORY[name] for name in _TRAJECTORY if name in saved)
    assert len(message.splitlines()) <= 1
