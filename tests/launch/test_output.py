"""What workers print: whole lines with a prefix, raw files, at any rate."""

import os
import pty
import re
import time
from pathlib import Path

import pytest

from launch.output import Prefixer


@pytest.fixture
def prefixer():
    return Prefixer(b"[w] ")


def test_lines_get_a_prefix(prefixer):
    assert prefixer.feed(b"a\nb\n") == b"[w] a\n[w] b\n"


def test_half_a_line_waits_for_its_end(prefixer):
    assert prefixer.feed(b"a\nb") == b"[w] a\n"
    assert prefixer.feed(b"c") == b""
    assert prefixer.feed(b"d\n") == b"[w] bcd\n"
    assert prefixer.finish() == b""


def test_unterminated_last_line_gets_an_end(prefixer):
    assert prefixer.feed(b"half") == b""
    assert prefixer.finish() == b"[w] half\n"


def test_empty_lines_and_bytes_that_are_no_text_pass(prefixer):
    assert prefixer.feed(b"\n\xff\x00\n") == b"[w] \n[w] \xff\x00\n"


def test_line_without_end_costs_bounded_memory(prefixer):
    shown = b"".join(prefixer.feed(b"x" * 1000) for _ in range(1000)) + prefixer.finish()
    assert max(map(len, shown.split(b"\n"))) <= (1 << 16) + 4
    assert shown.replace(b"\n", b"").replace(b"[w] ", b"") == b"x" * 1_000_000


def test_progress_bar_shows_its_last_state(prefixer):
    assert prefixer.feed(b"\r 10%\r 20%") == b""
    assert prefixer.feed(b"\r100%\nnext\n") == b"[w] 100%\n[w] next\n"


def test_progress_bar_with_return_at_the_end_shows_its_last_state(prefixer):
    for percent in range(100):
        assert prefixer.feed(b"%d%%\r" % percent) == b""
    assert prefixer.finish() == b"[w] 99%\n"


def test_long_progress_bar_is_shown_every_ten_seconds():
    now = [0.0]
    prefixer = Prefixer(b"[w] ", clock=lambda: now[0])
    assert prefixer.feed(b"\r1%\r2%") == b""
    now[0] = 11.0
    assert prefixer.feed(b"\r3%\r4%") == b"[w] 4%\n"
    assert prefixer.feed(b"\r5%\r6%") == b""


def test_windows_line_ends_are_line_ends(prefixer):
    assert prefixer.feed(b"a\r\nb\r") == b"[w] a\n"
    assert prefixer.feed(b"\nc\r\n") == b"[w] b\n[w] c\n"


def test_lines_of_many_workers_are_never_torn(launcher, python):
    source = """
for i in range(2000):
    os.write(1, b"%02d" % INDEX * 20)  # a line in two writes
    os.write(1, b"%02d\\n" % INDEX * 1)
"""
    result = launcher.run("--workers=8", *python(source), timeout_s=60)
    assert result.status == 0
    lines = result.out.splitlines()
    assert len(lines) == 8 * 2000
    for line in lines:
        match = re.fullmatch(rb"\[worker (\d)\] (\d\d)+", line)
        assert match
        assert line.endswith((b"0" + match[1]) * 21)


def test_standard_error_stays_standard_error(launcher):
    result = launcher.run("--workers=1", "--", "sh", "-c", "echo out; echo err >&2")
    assert result.out == b"[worker 0] out\n"
    assert "[worker 0] err\n" in result.err


def test_half_a_line_of_a_dying_worker_is_shown_and_reported(launcher):
    result = launcher.run("--workers=1", "--", "sh", "-c", "printf half; kill -9 $$")
    assert result.out == b"[worker 0] half\n"
    assert "  | half\n" in result.err


def test_flood_of_100_mb_comes_through_whole(launcher, tmp_path):
    script = f"yes {'x' * 79} | head -n 1250000"
    with open(tmp_path / "out", "wb") as out:
        result = launcher.run("--workers=1", "--", "sh", "-c", script, stdout=out, timeout_s=60)
    assert result.status == 0
    assert os.path.getsize(tmp_path / "out") == 1_250_000 * len(f"[worker 0] {'x' * 79}\n")


def test_flood_without_line_ends_comes_through_whole(launcher, tmp_path):
    with open(tmp_path / "out", "wb") as out:
        result = launcher.run(
            "--workers=1", "--log_dir=logs", "--", "head", "-c", "20000000", "/dev/zero", stdout=out
        )
    assert result.status == 0
    assert (tmp_path / "out").read_bytes().count(b"\0") == 20_000_000
    assert (tmp_path / "logs/worker-0.log").read_bytes() == bytes(20_000_000)


def test_log_files_are_raw_and_appended_to(launcher, tmp_path):
    script = "echo out $DIST_LAUNCH_INDEX; printf half >&2"
    for _ in range(2):
        launcher.run("--workers=2", "--log_dir=some/logs", "--", "sh", "-c", script)
    assert (tmp_path / "some/logs/worker-1.log").read_bytes() == b"out 1\nhalfout 1\nhalf"


@pytest.mark.parametrize("flag", [["--workdir=runs/a"], ["--workdir", "runs/a"]])
def test_logs_go_into_the_commands_workdir(launcher, tmp_path, flag):
    launcher.run("--workers=1", "--", "echo", *flag)
    assert (tmp_path / "runs/a/logs/worker-0.log").exists()


def test_no_workdir_no_logs(launcher, tmp_path):
    launcher.run("--workers=1", "--", "echo")
    assert list(tmp_path.iterdir()) == []


def test_log_dir_that_cannot_be_made_is_a_usage_error(launcher, tmp_path):
    (tmp_path / "file").touch()
    result = launcher.run("--log_dir=file/logs", "--", "echo")
    assert result.status == 2
    assert result.err == (
        "dist-launch: --log_dir=file/logs: Not a directory; name a folder that can be written\n"
    )


def test_full_disk_cuts_the_log_and_not_the_training(launcher, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/worker-0.log").symlink_to("/dev/full")
    result = launcher.run("--workers=1", "--log_dir=logs", "--", "sh", "-c", "echo a; echo b")
    assert result.status == 0
    assert result.out == b"[worker 0] a\n[worker 0] b\n"
    assert "No space left on device" in result.err


@pytest.mark.parametrize(
    ("flag", "shown"),
    [("--tee=all", b"012"), ("--tee=0,2", b"02"), ("--tee=none", b""), ("--quiet", b"")],
)
def test_tee_and_quiet_choose_whose_output_is_shown(launcher, flag, shown):
    result = launcher.run("--workers=3", flag, "--", "sh", "-c", "echo $DIST_LAUNCH_INDEX")
    assert bytes(sorted(re.sub(rb"\[worker \d\] |\n", b"", result.out))) == shown


def test_quiet_still_reports_the_failure(launcher):
    result = launcher.run("--quiet", "--workers=1", "--", "sh", "-c", "echo why; exit 3")
    assert result.out == b""
    assert "  | why\n" in result.err


def _run_on_a_terminal(launcher, *arguments, **options):
    ours, theirs = pty.openpty()
    process = launcher.start(*arguments, stdout=theirs, stderr=theirs, **options)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 4096):
            text += chunk
    except OSError:  # Linux says "end of file" on a terminal so
        pass
    os.close(ours)
    process.wait(timeout=10)
    return text


def test_terminal_gets_colours(launcher):
    text = _run_on_a_terminal(launcher, "--workers=1", "--", "echo", "hi", env={"TERM": "xterm"})
    assert b"\x1b[36m[worker 0]\x1b[0m hi" in text


def test_no_color_is_respected(launcher):
    text = _run_on_a_terminal(launcher, "--", "echo", "hi", env={"NO_COLOR": "1"})
    assert b"[worker 0] hi" in text
    assert b"\x1b" not in text


def test_reader_that_leaves_does_not_stop_the_training(launcher, tmp_path):
    script = "for i in 1 2 3 4 5; do echo $i; sleep 0.1; done; touch done-$DIST_LAUNCH_INDEX"
    process = launcher.start("--workers=2", "--log_dir=logs", "--", "sh", "-c", script)
    process.stdout.close()
    process.stdout = None
    assert launcher.finish(process).status == 0
    assert len(list(tmp_path.glob("done-*"))) == 2
    assert (tmp_path / "logs/worker-1.log").read_text() == "1\n2\n3\n4\n5\n"


def test_reader_that_stops_reading_does_not_keep_the_launcher_from_stopping(launcher):
    process = launcher.start("--workers=2", "--", "yes")
    time.sleep(0.5)  # the pipe is full by now
    process.terminate()
    process.wait(timeout=10)
    assert launcher.alive() == {}


def test_non_blocking_terminal_or_pipe_loses_nothing(launcher):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = launcher.start("--workers=1", "--", "seq", "200000", stdout=theirs)
    os.close(theirs)
    time.sleep(0.3)
    with os.fdopen(ours, "rb") as out:
        assert out.read().count(b"\n") == 200_000
    assert launcher.finish(process).status == 0


def test_memory_of_the_launcher_is_bounded(launcher, tmp_path):
    # Sixteen lines that do not end, and a reader that does not read.
    script = "head -c 3000000 /dev/zero; touch written-$DIST_LAUNCH_INDEX; exec sleep 60"
    process = launcher.start("--workers=16", "--", "sh", "-c", script)
    time.sleep(1.5)
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak_kib = int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    process.terminate()
    launcher.finish(process)
    assert peak_kib < 40_000
