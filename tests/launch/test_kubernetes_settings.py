"""What a user can get wrong with the Kubernetes backend, and the lines that say so."""

import re

import pytest
import yaml

from launch.errors import UsageError
from launch.kubernetes.settings import KINDS, Settings, Volume


def settings(**changes):
    return Settings(**{"kind": "job", "name": "mnist", "image": "mnist:1", "workers": 2, **changes})


@pytest.mark.parametrize(
    "image",
    [
        "mnist",
        "mnist:1",
        "mnist:V1.0-rc_2",
        "team/mnist",
        "localhost:5000/team/mnist:1",
        "registry.example.org/a/b__c/d-e.f:1",
        "mnist@sha256:" + "0af" * 21 + "0",
        "registry.example.org:443/mnist:1@sha256:" + "a" * 64,
    ],
)
def test_image_references_are_taken(image):
    assert settings(image=image).image == image


@pytest.mark.parametrize(
    "image",
    ["Mnist", "mnist:", ":1", "mnist:1:2", "a//b", "/a", "a/", "mnist 1", "mnist:-1", "a@sha256:0",
     "http://a/b", "mnist\n", "a" * 501, "é"],
)  # fmt: skip
def test_other_images_are_refused(image):
    with pytest.raises(UsageError, match=f"--image={re.escape(image)}: is no image reference"):
        settings(image=image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": ""}, "--backend=kubernetes needs the workers' image: add --image=NAME:TAG"),
        ({"name": "Mnist"}, "--name=Mnist: must be 1 to 63 of a-z"),
        ({"name": "1st"}, "--name=1st: must be"),
        ({"name": "a-"}, "--name=a-: must be"),
        ({"name": "a.b"}, "--name=a.b: must be"),
        ({"name": ""}, "--name=: must be"),
        ({"name": "a" * 64}, "must be 1 to 63"),
        ({"namespace": "a_b"}, "--namespace=a_b: must be 1 to 63"),
        ({"namespace": "-a"}, "--namespace=-a: must be"),
        ({"port": 80}, "--port=80: must be 1024 to 65535"),
        ({"port": 65536}, "--port=65536: must be 1024 to 65535"),
        ({"token_secret": "a b"}, "--token_secret=a b: a name in Kubernetes"),
        ({"pull_secrets": ("ok", "A")}, "--image_pull_secret=A: a name in Kubernetes"),
        ({"volumes": (Volume("a/b", "/c"),)}, "--volume=a/b: a name in Kubernetes"),
        ({"volumes": (Volume("a", "b"),)}, "--volume=a:b: must be CLAIM:/PATH"),
        ({"volumes": (Volume("a", ""),)}, "--volume=a:: must be CLAIM:/PATH"),
        ({"volumes": (Volume("a", "/"),)}, "--volume=a:/: must be CLAIM:/PATH"),
        ({"volumes": (Volume("a", "/b/../c"),)}, "--volume=a:/b/../c: must be CLAIM:/PATH"),
        ({"volumes": (Volume("a", "/tmp"),)}, "--volume=a:/tmp: something else is mounted there"),
        ({"volumes": (Volume("a", "/b"), Volume("c", "/b"))}, "something else is mounted there"),
        ({"cpu": "0"}, "--cpu=0: must be a positive number of CPUs"),
        ({"cpu": "four"}, "--cpu=four: must be"),
        ({"cpu": "1.5m"}, "--cpu=1.5m: must be"),
        ({"cpu": "-1"}, "--cpu=-1: must be"),
        ({"memory": "8"}, "--memory=8: must be positive and have a unit, as in 8Gi"),
        ({"memory": "0Gi"}, "--memory=0Gi: must be positive"),
        ({"memory": "8GB"}, "--memory=8GB: must be"),
        ({"memory": "8gi"}, "--memory=8gi: must be"),
        ({"labels": {"a b": "c"}}, "--label=a b=c: must be [PREFIX/]NAME=VALUE"),
        ({"labels": {"a": "b/c"}}, "--label=a=b/c: must be"),
        ({"labels": {"A.b/c": "d"}}, "--label=A.b/c=d: must be"),
        ({"labels": {"app.kubernetes.io/instance": "x"}}, "instance=x: must be"),
        ({"pull_policy": "always"}, "--image_pull_policy=always: must be Always, IfNotPresent"),
        ({"max_restarts": 1}, "--max_restarts=1: a Job replaces single pods, not the group; use"),
        ({"kind": "tfjob", "workers": 1}, "--workers=1: the operator gives a TFJob of one worker"),
    ],
)
def test_a_wrong_wish_is_one_line_with_its_flag(changes, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [2, 11, 101])
def test_the_longest_pod_name_has_63_characters(kind, workers):
    names = [name for name in ("a" * n for n in range(1, 64)) if fits(kind, name, workers)]
    longest = settings(kind=kind, name=names[-1], workers=workers)
    suffix = "" if kind == "tfjob" else "-abcde"
    assert len(longest.host_name(workers - 1) + suffix) == 63
    too_long = names[-1] + "a"
    with pytest.raises(UsageError, match=r"63 are allowed; shorten it by 1$"):
        settings(kind=kind, name=too_long, workers=workers)


def fits(kind, name, workers):
    try:
        settings(kind=kind, name=name, workers=workers)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend=kubernetes", "true"], "--backend=kubernetes needs the workers' image"),
        (["--image=a", "true"], "--image needs --backend=kubernetes"),
        (["--backend=kubernetes", "--image=a"], "no command: put it after the flags"),
        (
            ["--backend=kubernetes", "--image=a", "--workers=2:4", "true"],
            "--workers=2:4: nothing in Kubernetes starts the group again with fewer workers; use",
        ),
        (
            ["--backend=kubernetes", "--image=a", "--tee=0", "true"],
            "--tee has no meaning with --backend=kubernetes; use kubectl logs",
        ),
        (
            ["--backend=kubernetes", "--image=a", "--stall_timeout_s=9", "true"],
            "--stall_timeout_s has no meaning with --backend=kubernetes; give it to dist-train",
        ),
        (["--backend=kubernetes", "--image=a", "--label=b", "true"], "--label=b: has no value"),
        (
            ["--backend=kubernetes", "--image=a", "--kubernetes_kind=pod", "true"],
            "flag --kubernetes_kind=pod: value should be one of",
        ),
        (
            ["--backend=kubernetes", "--image=a", "--kubernetes_kind=trainjob", *["x"] * 129],
            "the command has 129 words and a TrainJob takes 128",
        ),
        (["--backend=kubernetes", "--image=a", b"\xff"], "the argument '\\udcff' is not UTF-8"),
    ],
)
def test_usage_errors_are_2_and_one_line(launcher, arguments, message):
    result = launcher.run(*arguments)
    assert result.status == 2
    assert result.err.startswith(f"dist-launch: {message}")
    assert result.err.count("\n") == 1
    assert result.out == b""


def test_manifest_is_printed_and_nothing_is_started(launcher, tmp_path):
    arguments = ["--backend=kubernetes", "--image=mnist:1", "--cpu=2", "--volume=runs:/runs"]
    result = launcher.run(*arguments, "--", "touch", "started", "é", env={"LC_ALL": "C"})
    assert (result.status, result.err) == (0, "")
    read = list(yaml.safe_load_all(result.out.decode()))
    assert [document["kind"] for document in read] == ["NetworkPolicy", "Service", "Job"]
    [container] = read[-1]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["touch", "started", "é"]
    dry = launcher.run(*arguments, "--dry_run", "--", "touch", "started", "é")
    assert dry.out == result.out
    assert list(tmp_path.iterdir()) == []


def test_comments_say_what_is_to_be_done(launcher):
    arguments = ["--backend=kubernetes", "--image=a", "--name=mnist", "--namespace=ml"]
    comments = launcher.run(*arguments, "true").out.decode().partition("---\n")[0]
    assert (
        "create secret generic mnist-token --from-file=token=/dev/stdin --namespace=ml" in comments
    )
    assert "--selector=app.kubernetes.io/instance=mnist --namespace=ml" in comments
    assert "raise its --start_timeout_s" in comments
    assert all(line.startswith("#") for line in comments.splitlines())
    arguments += ["--token_secret="]
    comments = launcher.run(*arguments, "true", "--start_timeout_s=900").out.decode()
    assert "secret" not in comments
    assert "raise its --start_timeout_s" not in comments


@pytest.mark.parametrize("kind", KINDS)
def test_comments_say_what_becomes_of_a_worker_that_ends(launcher, kind):
    restarts = "--max_restarts=0" if kind == "job" else "--max_restarts=3"
    arguments = ["--backend=kubernetes", "--image=a", f"--kubernetes_kind={kind}", restarts]
    comments = launcher.run(*arguments, "true").out.decode().partition("---\n")[0]
    expected = {
        "job": "Any other end fails the Job for good",
        "jobset": "any other end does so up to 3 times.",
        "trainjob": "any other end does so up to 3 times.",
        "tfjob": "restarts a worker in its pod, up to 3 times each.",
    }
    assert expected[kind] in comments


def test_dockerfile_needs_no_command_and_names_no_registry(launcher):
    result = launcher.run("--print_dockerfile")
    assert result.status == 0
    lines = result.out.decode().splitlines()
    images = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert len(images) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim", image) for image in images)
    assert "USER 1000:1000" in lines
    assert any("PYTHONUNBUFFERED=1" in line for line in lines)
    assert any(line.startswith("RUN pip wheel") and line.endswith(" /source") for line in lines)
