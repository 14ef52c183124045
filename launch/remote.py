"""What goes over ssh to start our agent on another machine: one command, and then its source.

Nothing of this project need be installed there: a Python with its standard library is enough. The
command line says nothing, since everybody on that machine can read it; source, environment and
command of the worker follow on standard input.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.job import Host, Job, Login, Task

# Reads one line, byte by byte as it must leave the rest to whoever reads after it.
# Without a single quote, so that whatever shell the user has there reads it alike.
_START = 'exec(open(0,"rb",0,closefd=False).readline())'
_LOADER = """
import json, os, sys, types
data = b""
while len(data) < SIZE:
    chunk = os.read(0, SIZE - len(data))
    if not chunk:
        sys.exit(0)
    data += chunk
message = json.loads(data)
package = sys.modules["launch"] = types.ModuleType("launch")
for name, source in message["sources"].items():
    module = sys.modules["launch." + name] = types.ModuleType("launch." + name)
    setattr(package, name, module)
    exec(compile(source, name + ".py", "exec"), module.__dict__)
getattr(package, message["module"]).main(message["request"])
"""


def command(login: Login) -> list[str]:
    """The command that starts the agent; it then reads a payload."""
    return [*login.ssh, shlex.join([login.python, "-I", "-S", "-c", _START])]


def worker_payload(task: Task, environ: Mapping[str, str], link_timeout_s: float) -> bytes:
    """Makes `launch.agent` run one worker and speak to `launch.relay` about it."""
    request = {
        "command": task.command,
        "directory": task.directory,
        "env": {**environ, **task.env},
        "cpus": task.place.cpus,
        "held_port": task.held_port,
        "link_timeout_s": link_timeout_s,
    }
    return _payload(("guard", "ports", "relay", "agent"), request)


def survey_payload(job: Job, host: Host, *, ports: int, checks: bool) -> bytes:
    """Makes `launch.survey` answer what is asked of it.

    Args:
        ports: how many free ones are needed.
        checks: whether to check that a worker could run there.
    """
    request = {
        "command": job.command,
        "directory": job.directory,
        "env": dict(job.environ),
        "address": host.address.strip("[]"),
        "ports": ports,
        "former_ports": job.former_ports(host),
        "checks": checks,
    }
    return _payload(("guard", "ports", "relay", "agent", "binding", "survey"), request)


def _payload(modules: Sequence[str], request: Mapping[str, Any]) -> bytes:
    """The modules' source, and what the last of them is to do."""
    here = Path(__file__).parent
    sources = {name: (here / f"{name}.py").read_text() for name in modules}
    message = {"sources": sources, "module": modules[-1], "request": request}
    body = json.dumps(message).encode()
    loader = _LOADER.replace("SIZE", str(len(body)))
    return f"exec({loader!r})\n".encode() + body
