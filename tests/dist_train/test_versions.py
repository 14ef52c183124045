import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from dist_train import versions

_ROOT = Path(__file__).parents[2]


def test_installed_names_what_the_numbers_depend_on():
    found = versions.installed()
    assert {"python", "tensorflow", "keras", "numpy"} <= set(found)
    assert found["python"] == platform.python_version()
    assert found["keras"] == importlib.metadata.version("keras")


def test_nothing_is_imported_to_find_a_version():
    code = (
        "import sys\nfrom dist_train import versions\nprint(versions.installed())\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(_ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)


def test_a_package_that_is_missing_is_left_out(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert versions.installed() == {"python": platform.python_version()}


def test_the_digest_is_that_of_every_source_file(tmp_path, monkeypatch):
    package = tmp_path / "dist_train"
    shutil.copytree(_ROOT / "dist_train", package, ignore=shutil.ignore_patterns("*.gz"))
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    seen = {versions.source_digest()}
    assert versions.source_digest() in seen
    for path in sorted(package.rglob("*.py")):
        path.write_bytes(path.read_bytes() + b"\n")
        digest = versions.source_digest()
        assert digest not in seen, path
        seen.add(digest)
    (package / "new.py").touch()
    assert versions.source_digest() not in seen


def test_the_digest_does_not_depend_on_the_place(tmp_path, monkeypatch):
    here = versions.source_digest()
    package = tmp_path / "elsewhere"
    shutil.copytree(_ROOT / "dist_train", package)
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    assert versions.source_digest() == here


def test_further_files_count(tmp_path):
    path = tmp_path / "task.py"
    path.write_text("x = 1")
    one = versions.source_digest([path])
    assert one != versions.source_digest()
    path.write_text("x = 2")
    assert versions.source_digest([path]) != one
