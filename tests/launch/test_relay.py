"""The relay alone: a program in the place of ssh, and a launcher that does not read."""

import select
import socket
import subprocess
import sys

from launch import relay

# More beats than a socket takes; then it is quiet until it hears a sign of life, later than they.
AGENT = """
import os, select, struct, sys, time
def send(kind, content=b""):
    os.write(1, struct.pack("!cI", kind, len(content)) + content)
os.read(0, 1)
os.write(1, b"\\0dist-launch\\0")
send(b"c", b"pid 7")
for step in range(1000):
    if step == 500:
        send(b"c", b"state T")
    send(b"c", b"beat %d" % step)
time.sleep(0.5)
os.read(0, 64)
if select.select([0], [], [], 5)[0] and os.read(0, 1):
    send(b"1", b"heard\\n")
    send(b"c", b"exit 0 -")
    send(b"e")
"""


def test_relay_goes_on_while_nobody_reads_its_news_and_loses_none_but_beats():
    ours, its = socket.socketpair()
    with ours, its:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", relay.__file__, "10", sys.executable, "-c", AGENT],
            stdin=its,
            stdout=subprocess.PIPE,
        )
        its.close()
        with process, ours.makefile("rb") as news:
            try:
                ours.sendall((0).to_bytes(4, "big"))
                assert select.select([process.stdout], [], [], 10)[0], "the relay hangs"
                assert process.stdout.readline() == b"heard\n"
                lines = news.read().decode().splitlines()
                assert process.wait(10) == 0
            finally:
                process.kill()
    middle = lines.index("state T")
    assert (lines[0], lines[middle - 1]) == ("pid 7", "beat 499")
    assert lines[middle + 1 :] == ["beat 999", "exit 0 -"]
