"""The ssh backend before the start: what is found by questions to three hosts with real servers."""

import os
import re
import sys
import time

import pytest

pytestmark = pytest.mark.slow

# The launcher's own bound for a question is 10 s; the machine may be loaded.
_PREFLIGHT_S = 15


def check(cluster, *arguments, status, **env):
    begin = time.monotonic()
    code, output = cluster.run(*arguments, **env)
    assert time.monotonic() - begin < _PREFLIGHT_S
    assert code == status, output
    assert "Traceback" not in output
    assert "[worker" not in output
    return output


def test_unreachable_host_is_named(cluster):
    cluster.network["n3"].cut()
    output = check(cluster, "--hosts=n1,n2,n3", "--", "true", status=2)
    assert re.search(r"\[launch\] n3: .*is it up", output), output
    assert "n1:" not in output


def test_unknown_name_and_refused_key_are_named(cluster):
    output = check(cluster, "--hosts=n1,n9", "--", "true", status=2)
    assert "n9: ssh: Could not resolve hostname n9" in output
    output = check(cluster, "--hosts=n1,nobody@n2", "--", "true", status=2)
    assert re.search(r"n2: .*Permission denied.*--ssh_identity", output), output


def test_missing_directory_and_command_are_named(cluster):
    folder = cluster.network["n2"].run(["mktemp", "-d"]).strip()
    cluster.network["n2"].run(["mount", "--bind", folder, cluster.folder.parent])
    try:
        output = check(cluster, "--hosts=n1,n2", "--", "true", status=2)
    finally:
        cluster.network["n2"].run(["umount", cluster.folder.parent])
        os.rmdir(folder)
    assert f"n2: the working directory {cluster.folder}: No such file" in output
    output = check(cluster, "--hosts=n1,n2", "--", "no-such-command", status=127)
    assert "n1: the command no-such-command is missing" in output


def test_other_versions_are_named(cluster):
    for name, version in (("a", "1.5"), ("b", "1.6")):
        info = cluster.folder / name / "keras-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: keras\nVersion: {version}")
    here, there = cluster.folder / "a", cluster.folder / "b"
    cluster.network["n2"].run(["mount", "--bind", there, here])
    try:
        output = check(
            *(cluster, "--hosts=n1,n2", "--env=PYTHONPATH=" + str(here)),
            *("--", sys.executable, "-c", "pass"),
            status=2,
        )
    finally:
        cluster.network["n2"].run(["umount", here])
    assert "n2: keras 1.6 here, 1.5 on n1; install the same versions" in output


def test_name_that_a_host_takes_for_loopback_is_named(cluster):
    wrong = cluster.folder / "hosts"
    wrong.write_text("127.0.1.1 n2\n10.77.0.1 n1\n")
    cluster.network["n2"].run(["mount", "--bind", wrong, "/etc/hosts"])
    try:
        output = check(cluster, "--hosts=n1,n2", "--", "true", status=2)
    finally:
        cluster.network["n2"].run(["umount", "/etc/hosts"])
    assert "n2: it takes its own name for 127.0.1.1" in output


def test_closed_port_between_two_hosts_is_named(cluster):
    # A route of its own that leads nowhere: n1 and n3 do not reach each other, the head both.
    cluster.network["n1"].run(["ip", "route", "add", "unreachable", "10.77.0.3/32"])
    try:
        output = check(cluster, "--hosts=n1,n3", "--", "true", status=2)
    finally:
        cluster.network["n1"].run(["ip", "route", "del", "unreachable", "10.77.0.3/32"])
    assert re.search(r"n1: cannot reach n3:\d+: No route to host", output), output


def test_host_that_does_not_answer_is_left_out_of_an_elastic_run(cluster):
    cluster.network["n2"].cut()
    code, output = cluster.run("--hosts=n1,n2,n3", "--workers=2:3", "--", "hostname")
    assert code == 0, output
    assert "left out: n2: " in output
    assert "[worker 0 n1] n1" in output
    assert "[worker 1 n3] n3" in output


def test_host_that_hangs_takes_no_time_of_those_that_answer(cluster):
    python, hanging = cluster.folder / "python", cluster.folder / "hanging"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    hanging.write_text("#!/bin/sh\nexec cat > /dev/null\n")
    for path in (python, hanging):
        path.chmod(0o755)
    cluster.network["n2"].run(["mount", "--bind", hanging, python])
    try:
        code, output = cluster.run(
            *("--hosts=n1,n2,n3", "--workers=2:3", f"--remote_python={python}"),
            *("--", "sh", "-c", "hostname; ss --no-header --listening --tcp --numeric"),
        )
    finally:
        cluster.network["n2"].run(["umount", python])
    assert code == 0, output
    assert "left out: n2: no answer within 10 s" in output
    assert "[worker 0 n1] n1" in output
    assert "[worker 1 n3] n3" in output
    listening = re.findall(r"LISTEN\s+\d+\s+\d+\s+\S+:(\d+)", output)
    assert set(listening) == {"22"}, output
