"""Free ports that stay ours until the workers listen on them."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def held(count: int, *, release: bool = False) -> Iterator[list[int]]:
    """Yields free ports on all interfaces, and keeps others from being given them.

    A socket that is bound, does not listen and has SO_REUSEADDR keeps the kernel from handing its
    port to anybody, while a server that sets SO_REUSEADDR too (gRPC, and nearly all others) may
    bind and listen on it. So the port is held for as long as the group runs.

    Args:
        count: how many.
        release: give them up before the workers start, for servers that do not set SO_REUSEADDR.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", 0))
        ports = [sock.getsockname()[1] for sock in sockets]
        if release:
            stack.close()
        yield ports
