"""What the launcher costs: time to start, memory, time to stop, throughput of its pipes.

    python tests/benchmarks/launcher.py

Each figure is the median of some runs; the table says what it is bounded by.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOOD_BYTES = 400_000_000


def launch(*arguments: str, **options) -> subprocess.Popen[bytes]:
    """Starts a launcher; its standard output is dropped if `options` do not say otherwise."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *arguments],
        cwd=ROOT,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options},
    )


def seconds_to_exec(workers: int) -> float:
    """From the launcher's start to the last worker's first instruction."""
    begin = time.time()
    process = launch(f"--workers={workers}", "--", "date", "+%s.%N", stdout=subprocess.PIPE)
    out, _ = process.communicate()
    return max(float(line.split()[-1]) for line in out.splitlines()) - begin


def memory_mib(workers: int) -> tuple[float, float]:
    """Peak resident memory of a launcher under a flood, and what each of its guards adds.

    A guard's share is its proportional set size: most of its pages are the interpreter's, which all
    have in common.
    """
    process = launch(f"--workers={workers}", "--", "timeout", "1", "yes")
    time.sleep(0.8)
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    guards = []
    for child in children:
        rollup = Path(f"/proc/{child}/smaps_rollup").read_text()
        guards.append(int(re.search(r"\nPss:\s+(\d+)", rollup)[1]) / 1024)  # type: ignore[index]
    process.wait()
    return peak, statistics.mean(guards)


def seconds_to_stop() -> float:
    """From a worker's death to the launcher's end, with a peer that leaves at once on SIGTERM."""
    script = (
        "[ $DIST_LAUNCH_INDEX = 1 ] && { sleep 0.3; date +%s.%N; kill -KILL $$; }; exec sleep 60"
    )
    process = launch("--workers=2", "--", "sh", "-c", script, stdout=subprocess.PIPE)
    out, _ = process.communicate()
    return time.time() - float(out.split()[-1])


def seconds_to_restart() -> float:
    """From a worker's death to the exec of its successor, the 1 s of back-off included."""
    script = """
date +%s.%N
[ $DIST_LAUNCH_RESTART = 1 ] && exit 0
[ $DIST_LAUNCH_INDEX = 1 ] && { sleep 0.3; date +%s.%N; kill -KILL $$; }
exec sleep 60
"""
    process = launch(
        "--workers=2", "--max_restarts=1", "--", "sh", "-c", script, stdout=subprocess.PIPE
    )
    out, _ = process.communicate()
    *_, death, _, last = sorted(float(line.split()[-1]) for line in out.splitlines())
    return last - death


def flood_mb_per_second(workers: int, *, to_file: bool) -> float:
    """Lines of 80 bytes from all workers together, as many bytes as they write."""
    blocks = FLOOD_BYTES // workers // 80_000
    code = f"import os\nfor _ in range({blocks}): os.write(1, (b'x' * 79 + b'\\n') * 1000)"
    with open(os.devnull, "wb") if not to_file else open("/dev/shm/flood", "wb") as target:
        begin = time.monotonic()
        launch(f"--workers={workers}", "--", sys.executable, "-S", "-c", code, stdout=target).wait()
        seconds = time.monotonic() - begin
    if to_file:
        os.unlink("/dev/shm/flood")
    return FLOOD_BYTES / seconds / 1e6


def seconds_of_help() -> float:
    """The whole of `dist-launch --help`."""
    begin = time.monotonic()
    launch("--help").wait()
    return time.monotonic() - begin


def median(measure: Callable[[], float], runs: int = 5) -> float:
    """The median of some runs."""
    return statistics.median(measure() for _ in range(runs))


def main() -> None:
    """Prints the table, as Markdown."""
    peak, guard = memory_mib(2)
    peak_16, _ = memory_mib(16)
    rows = [
        ("`--help`", f"{median(seconds_of_help):.2f} s", "0.3 s"),
        ("start to exec of 2 workers", f"{median(lambda: seconds_to_exec(2)):.2f} s", "0.3 s"),
        ("start to exec of 16 workers", f"{median(lambda: seconds_to_exec(16)):.2f} s", ""),
        ("launcher's peak memory, 2 workers", f"{peak:.0f} MiB", "40 MB"),
        ("launcher's peak memory, 16 workers", f"{peak_16:.0f} MiB", "40 MB"),
        ("each guard's share of memory", f"{guard:.1f} MiB", ""),
        ("worker's death to launcher's end", f"{median(seconds_to_stop):.2f} s", "2 s"),
        ("worker's death to its successor's exec", f"{median(seconds_to_restart, 3):.2f} s", ""),
        (
            "1 worker's output to /dev/null",
            f"{flood_mb_per_second(1, to_file=False):.0f} MB/s",
            "200 MB/s",
        ),
        (
            "1 worker's output to a file in memory",
            f"{flood_mb_per_second(1, to_file=True):.0f} MB/s",
            "200 MB/s",
        ),
        (
            "4 workers' output to /dev/null",
            f"{flood_mb_per_second(4, to_file=False):.0f} MB/s",
            "200 MB/s",
        ),
    ]
    print("| what | measured | bound |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
