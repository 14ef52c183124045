import json
import os
import subprocess
import sys

import pytest

MEGABYTES = 100
SCRIPT = f"""
import contextlib, json, os, resource, sys, time
import numpy as np
from dist_train import allocator

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

def use():
    np.empty({MEGABYTES} << 20, np.uint8).fill(1)

allocator._SWEEP_S = 3.0
blocks = [bytearray(60_000) for _ in range({MEGABYTES} * 2**20 // 60_000)]
for block in blocks:
    block[:] = b"1" * 60_000
*_, above = blocks  # which keeps what is below it from going by itself
del blocks, block, _
unused = resident()
with allocator.keeping_memory(os.environ) if sys.argv[1:] else contextlib.nullcontext():
    begin = resident()
    use()
    before = faults()
    for _ in range(10):
        use()
    again, held = faults() - before, resident() - begin
    deadline = time.monotonic() + 20
    while resident() - begin > {MEGABYTES} / 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    idle = resident() - begin
    use()
print(json.dumps([unused - begin, again, held, idle, resident() - begin]))
"""
glibc = pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library than GNU's"
)


def run(*arguments, **variables):
    """What the script prints.

    MiB given back at the beginning, page faults of using memory ten times again, MiB held then,
    when idle, and at the end.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@glibc
def test_freed_memory_is_used_again_and_given_back_when_idle_and_in_the_end():
    _, without, *_ = run()
    _, again, held, idle, end = run("keep")
    assert again < without / 4
    assert held > 0.9 * MEGABYTES
    assert idle < 0.5 * MEGABYTES
    assert end < 0.5 * MEGABYTES


@glibc
def test_what_a_start_has_left_is_given_back():
    assert run()[0] < 0.5 * MEGABYTES
    assert run("keep")[0] > 0.5 * MEGABYTES


@glibc
@pytest.mark.parametrize(
    "variable",
    [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}],
)
def test_what_the_user_has_settled_stays(variable):
    assert run("keep", **variable)[2] < 0.5 * MEGABYTES


@glibc
@pytest.mark.parametrize(
    "variable", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}]
)
def test_settings_of_something_else_do_not_hinder_it(variable):
    assert run("keep", **variable)[2] > 0.9 * MEGABYTES
