"""Free ports that stay ours until the workers listen on them.

A socket that is bound, does not listen and has SO_REUSEADDR keeps the kernel from handing its port
to anybody, while a server that sets SO_REUSEADDR too (gRPC, and nearly all others) may bind and
listen on it. So a port is held for as long as the group runs.

It imports nothing but the standard library: `launch.remote` sends it to other machines.
"""

import contextlib
import socket
from collections.abc import Collection, Iterator


def hold(port: int) -> socket.socket:
    """Keeps others from being given a port (0: a free one), on all interfaces.

    Raises:
        OSError: somebody has it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))
    return sock


def hold_free(count: int, former: Collection[int]) -> list[socket.socket]:
    """Holds free ports, none of which is a former one."""
    found: list[socket.socket] = []
    with contextlib.ExitStack() as refused:  # held meanwhile: the next one is another
        while len(found) < count:
            sock = hold(0)
            if number(sock) in former:
                refused.enter_context(sock)
            else:
                found.append(sock)
    return found


def number(sock: socket.socket) -> int:
    """The port that a socket holds."""
    return int(sock.getsockname()[1])


@contextlib.contextmanager
def held(count: int, former: Collection[int], *, release: bool) -> Iterator[list[int]]:
    """Yields free ports, and holds them meanwhile.

    Args:
        count: how many.
        former: ports that are not to be taken.
        release: give them up before the workers start, for servers that do not set SO_REUSEADDR.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in hold_free(count, former)]
        ports = [number(sock) for sock in sockets]
        if release:
            stack.close()
        yield ports
