"""The ssh backend on three hosts with real servers: workers and their ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import hosts
import pytest
import sshd

pytestmark = pytest.mark.slow

AGENT = "exec(open(0"

GROWS_A_TREE = """
import os, signal, sys, time
def leave(number, frame):
    print("saved after", number)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)
open("up-%s-%s" % (os.environ["DIST_LAUNCH_RESTART"], os.environ["DIST_LAUNCH_INDEX"]), "w").close()
time.sleep(100)
"""
TREE = ["--", sys.executable, "-S", "-E", "-c", GROWS_A_TREE]


def wait_for_workers(cluster, process, count, restart=0):
    pattern = f"up-{restart}-*"
    up = hosts.wait_until(lambda: len(list(cluster.folder.glob(pattern))) == count, 40)
    assert up, process.log.read_text()


def test_workers_know_the_cluster_their_host_and_their_place(cluster):
    script = """
echo "$(hostname) $DIST_LAUNCH_LOCAL_INDEX $(pwd) $TF_CONFIG"; echo to stderr >&2; cat
"""
    status, output = cluster.run("--hosts=n1,n2:2", "--", "sh", "-c", script)
    assert status == 0, output
    found = {}
    for line in output.splitlines():
        if match := re.match(r"\[worker (\d) (n\d)\] (n\d) (\d) (\S+) (\{.*)", line):
            assert match[2] == match[3]
            assert match[5] == str(cluster.folder)
            found[int(match[1])] = (match[2], int(match[4]), json.loads(match[6]))
    assert [found[index][:2] for index in range(3)] == [("n1", 0), ("n2", 0), ("n2", 1)]
    addresses = found[0][2]["cluster"]["worker"]
    assert [address.split(":")[0] for address in addresses] == ["n1", "n2", "n2"]
    assert len(set(addresses)) == 3
    assert [found[index][2]["task"]["index"] for index in range(3)] == [0, 1, 2]
    assert output.count("] to stderr") == 3


def test_cpus_are_those_of_the_host_and_not_of_the_launcher(cluster):
    host = cluster.network["n3"]
    [server] = [pid for pid, it in host.processes().items() if "[listener]" in it]
    before = os.sched_getaffinity(server)
    one = min(before)
    os.sched_setaffinity(server, {one})  # and with it of all that it starts
    try:
        script = "echo $OMP_NUM_THREADS; taskset -c -p $$"
        status, output = cluster.run("--hosts=n1,n3", "--", "sh", "-c", script)
    finally:
        os.sched_setaffinity(server, before)
    assert status == 0, output
    assert f"n3 1 thread each; CPUs {one}\n" in output
    assert "[worker 1 n3] 1\n" in output
    assert re.search(rf"\[worker 1 n3\] .* affinity list: {one}\n", output)
    assert f"[worker 0 n1] {len(before)}\n" in output


def test_hosts_of_a_file_are_reached_by_ipv6_and_as_another_user(cluster):
    if not cluster.network["n1"].has_address6():
        pytest.skip("needs IPv6")
    address = f"[{cluster.network['n2'].address6}]"
    (cluster.folder / "hosts").write_text(f"# mine\nroot@n1\n{address} slots=2  # two\n")
    status, output = cluster.run("--hostfile=hosts", "--", "sh", "-c", "echo $TF_CONFIG; hostname")
    assert status == 0, output
    assert re.search(rf'"n1:\d+", "{re.escape(address)}:\d+", "{re.escape(address)}:\d+"', output)
    assert output.count("] n2\n") == 2


@pytest.mark.parametrize(("end", "status"), [("exit 7", 7), ("kill -SEGV $$", 139)])
def test_exit_status_and_signal_of_a_worker_come_back_exactly(cluster, end, status):
    script = f"[ $DIST_LAUNCH_INDEX = 1 ] && {{ echo oh no; {end}; }}; exec sleep 60"
    code, output = cluster.run("--hosts=n1,n2", "--nopreflight", "--", "sh", "-c", script)
    assert code == status, output
    assert re.search(r"first failure.*worker 1 \(pid \d+ on n2\)", output)
    assert "  | oh no" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_request_is_forwarded_and_leaves_nothing_anywhere(cluster, number):
    process = cluster.start("--hosts=n1,n2,n3", *TREE)
    wait_for_workers(cluster, process, 3)
    os.kill(process.inside, number)
    assert process.wait(30) == 75
    assert process.log.read_text().count(f"saved after {number}") == 3
    assert hosts.wait_until(lambda: cluster.alive() == {}, 15), cluster.alive()


def test_launcher_killed_with_sigkill_leaves_nothing_on_any_host(cluster):
    process = cluster.start("--hosts=n1,n2,n3", *TREE)
    wait_for_workers(cluster, process, 3)
    assert set(cluster.alive()) == {"head", "n1", "n2", "n3"}
    os.kill(process.inside, signal.SIGKILL)
    assert hosts.wait_until(lambda: cluster.alive() == {}, 10), cluster.alive()


def test_killed_client_or_agent_ends_the_worker_and_names_the_host(cluster):
    for victim in ("client", "agent"):
        for mark in cluster.folder.glob("up-*"):
            mark.unlink()
        process = cluster.start("--hosts=n1,n2", *TREE)
        wait_for_workers(cluster, process, 2)
        host = cluster.network.head if victim == "client" else cluster.network["n2"]
        os.kill(victim_of(host, victim), signal.SIGKILL)
        assert process.wait(30) == 255
        output = process.log.read_text()
        assert "worker 1 was lost with n2: the connection ended" in output, output
        assert hosts.wait_until(lambda: cluster.alive() == {}, 15), cluster.alive()


def victim_of(host, victim):
    """The ssh client below worker 1's relay, or the agent above a guard."""
    if victim == "agent":
        return parent(parent(worker_on(host)))
    processes = host.processes()
    [relay] = [pid for pid, it in processes.items() if "relay.py" in it and "-- n2" in it]
    [client] = [pid for pid, it in processes.items() if it[:4] == "ssh " and parent(pid) == relay]
    return client


def worker_on(host):
    """The process whose parent is a guard, which is a fork of our agent."""
    agents = {pid for pid, it in host.processes().items() if AGENT in it}
    [worker] = [p for p in host.processes() if p not in agents and parent(p) in agents]
    return worker


def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def test_cut_link_is_noticed_and_named_and_the_other_end_kills_its_tree(cluster):
    process = cluster.start("--hosts=n1,n2", "--link_timeout_s=4", *TREE)
    wait_for_workers(cluster, process, 2)
    cluster.network["n2"].cut()
    begin = time.monotonic()
    assert process.wait(30) == 255
    assert time.monotonic() - begin < 4 + 10
    output = process.log.read_text()
    assert "worker 1 was lost with n2: nothing came over the link for 4 s" in output
    assert "worker 0: stopped on request, exit status 75" in output
    assert hosts.wait_until(lambda: cluster.alive() == {}, 20), cluster.alive()


def test_cut_of_a_second_ends_nothing(cluster):
    script = "echo begin; sleep 6; echo end"
    process = cluster.start("--hosts=n1,n2", "--link_timeout_s=6", "--", "sh", "-c", script)
    assert hosts.wait_until(lambda: process.log.read_text().count("] begin") == 2, 30)
    cluster.network["n2"].cut()
    time.sleep(1)
    cluster.network["n2"].mend()
    assert process.wait(40) == 0
    assert process.log.read_text().count("] end") == 2


def test_dead_host_is_left_out_and_taken_back(cluster):
    flags = ["--workers=2:3", "--max_restarts=3", "--link_timeout_s=4", "--grace_period_s=5"]
    process = cluster.start("--hosts=n1,n2,n3", *flags, *TREE)
    wait_for_workers(cluster, process, 3)
    cluster.network["n2"].cut()
    wait_for_workers(cluster, process, 2, restart=1)
    assert "left out: n2: ssh: connect to host n2 port 22" in process.log.read_text()
    cluster.network["n2"].mend()
    os.kill(worker_on(cluster.network["n3"]), signal.SIGKILL)
    wait_for_workers(cluster, process, 3, restart=2)
    os.kill(process.inside, signal.SIGTERM)
    assert process.wait(30) == 75


def test_dead_host_ends_a_run_that_cannot_do_without_it(cluster):
    flags = ["--max_restarts=1", "--link_timeout_s=4"]
    process = cluster.start("--hosts=n1,n2", *flags, *TREE)
    wait_for_workers(cluster, process, 2)
    cluster.network["n2"].cut()
    assert process.wait(60) == 255
    output = process.log.read_text()
    assert "restart 1 of 1" in output
    assert re.search(r"first failure.*\n?.*lost with n2: ssh: connect to host n2", output), output


def test_variables_are_carried_over_and_no_secret_is_on_a_command_line(cluster):
    script = """
echo "token=$DIST_TRAIN_TOKEN own=$OWN extra=$EXTRA tf=$TF_SOMETHING other=$OTHER"
while [ ! -e seen ]; do sleep 0.1; done
"""
    process = cluster.start(
        *["--hosts=n1,n2", "--env=OWN,EXTRA2", "--env=EXTRA=a b,c", "--", "sh", "-c", script],
        DIST_TRAIN_TOKEN="hush-4711",
        OWN="hush-4712",
        EXTRA2="x",
        TF_SOMETHING="1",
        OTHER="stays here",
    )
    line = "token=hush-4711 own=hush-4712 extra=a b,c tf=1 other=\n"
    assert hosts.wait_until(lambda: process.log.read_text().count(line) == 2, 40)
    commands = [command for each in cluster.alive().values() for command in each]
    (cluster.folder / "seen").touch()
    assert len(commands) > 6
    assert not [command for command in commands if "hush" in command]
    assert process.wait(30) == 0


def test_heartbeats_and_stacks_cross_the_network(cluster):
    source = """
import faulthandler, os, signal, time
faulthandler.register(signal.SIGQUIT)
def wait_for_peer():
    while True:
        time.sleep(0.05)
for step in range(3 if os.environ["DIST_LAUNCH_INDEX"] == "1" else 4):
    with open(os.environ["DIST_LAUNCH_HEARTBEAT"], "w") as file:
        file.write(str(step))
    time.sleep(0.7)
wait_for_peer()
"""
    command = [sys.executable, "-S", "-E", "-c", source]
    status, output = cluster.run("--hosts=n1,n2", "--stall_timeout_s=3", "--", *command)
    assert status == 1
    assert re.search(r"first failure.*worker 1 \(pid \d+ on n2\): has been silent for", output)
    assert "at step 2 (the furthest is 3)" in output
    for index in (0, 1):
        assert re.search(rf"\[worker {index} n{index + 1}\]   File .* in wait_for_peer", output)


def test_much_output_arrives_whole(cluster):
    command = ["sh", "-c", "seq 200000; seq 200000 >&2"]
    status, output = cluster.run("--hosts=n1,n2", "--nopreflight", "--", *command)
    assert status == 0
    for worker in ("worker 0 n1", "worker 1 n2"):
        lines = [line for line in output.splitlines() if line.startswith(f"[{worker}]")]
        assert len(lines) == 400000
        assert lines.count(f"[{worker}] 200000") == 2


def test_stopped_terminal_stops_no_beats(cluster):
    # Nobody reads the output for longer than the link may be silent.
    command = ["sh", "-c", "seq 1000000; echo end"]
    launch = [sys.executable, "-m", "launch", "--backend=ssh", "--hosts=n1", "--nopreflight"]
    launch += ["--link_timeout_s=4", f"--ssh_options=-F {cluster.config}", "--", *command]
    environ = {**os.environ, "PYTHONPATH": str(sshd.ROOT)}
    with cluster.network.head.start(
        launch, cwd=cluster.folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        time.sleep(9)
        output = process.stdout.read()
    assert process.returncode == 0, output[-2000:]
    assert output.count(b"\n") > 1000000
    assert b"] end\n" in output


def test_request_during_the_preflight_ends_it(cluster):
    cluster.network["n2"].cut()
    process = cluster.start("--hosts=n1,n2", "--", "true")
    assert hosts.wait_until(lambda: any(c[:4] == "ssh " for c in cluster.alive().get("head", [])))
    os.kill(process.inside, signal.SIGINT)
    assert process.wait(30) == 75
    assert "before the workers were started" in process.log.read_text()


def test_launcher_killed_at_any_moment_of_the_start_leaves_nothing(cluster):
    for delay_s in (0.3, 0.7, 1.1, 1.5):
        process = cluster.start("--hosts=n1,n2", *TREE)
        time.sleep(delay_s)
        os.kill(process.inside, signal.SIGKILL)
    assert hosts.wait_until(lambda: cluster.alive() == {}, 15), cluster.alive()


def test_worker_that_cannot_run_is_said_without_a_preflight(cluster):
    status, output = cluster.run("--hosts=n1", "--nopreflight", "--", "no-such-command")
    assert status == 127
    assert "worker 0 on n1 could not be run: No such file or directory" in output


def test_many_workers_of_one_host_come_in_though_it_turns_some_away(cluster):
    status, output = cluster.run("--hosts=n3:12", "--", "sh", "-c", "echo $DIST_LAUNCH_LOCAL_INDEX")
    assert status == 0, output
    assert sorted(re.findall(r"n3\] (\d+)", output), key=int) == [str(n) for n in range(12)]


def test_dry_run_lines_do_in_a_shell_what_the_launcher_does(cluster):
    script = 'echo "$DIST_LAUNCH_INDEX $(hostname) $(pwd) $TF_SOMETHING [$1]"'
    command = ["--", "sh", "-c", script, "sh", "it's $HOME"]
    env = {"TF_SOMETHING": "a b", "DIST_TRAIN_TOKEN": "hush-4711"}
    status, dry = cluster.run("--hosts=n1,n2", "--dry_run", *command, **env)
    assert status == 0
    assert "hush" not in dry
    assert "DIST_TRAIN_TOKEN" in dry
    pasted = cluster.network.head.run(["sh", "-c", dry])
    assert pasted.splitlines() == [
        f"{index} n{index + 1} {cluster.folder} a b [it's $HOME]" for index in (0, 1)
    ]
