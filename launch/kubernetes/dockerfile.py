"""A Dockerfile for the workers' image."""

from launch.kubernetes.pod import USER

_TEXT = """\
# dist-launch --print_dockerfile | docker build --tag=IMAGE --file=- .
# where setup.cfg is; for GPUs with --build-arg=EXTRA=[gpu]
FROM python:{python}-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir=/wheels /source

FROM python:{python}-slim
ARG EXTRA=
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN groupadd --gid={user} worker && useradd --uid={user} --gid={user} --create-home worker
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \\
    pip install --no-cache-dir "$(ls /wheels/*.whl)$EXTRA"
# A number: Kubernetes cannot tell from a name that it is not root.
USER {user}:{user}
WORKDIR /home/worker
CMD ["dist-train", "--help"]
"""


def text(python: tuple[int, int]) -> str:
    """The Dockerfile.

    Args:
        python: its version; the one that the launcher has run with is a safe choice.
    """
    return _TEXT.format(python=".".join(map(str, python)), user=USER)
