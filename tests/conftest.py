"""What the tests of both packages share."""

from collections.abc import Mapping

import hypothesis
import pytest

# Whatever the pace of the machine; all else as hypothesis has it, here and where CI is set.
hypothesis.settings.register_profile(
    "any pace",
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("any pace")


class Kubelet:
    """What a kubelet makes of a pod template: the process's environment and command.

    Attributes:
        secrets: name of a Secret -> its keys and values.
    """

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, str]] = {}

    def environment(self, template: dict, index: int) -> dict[str, str]:
        """The environment of the pod of an index, without what the image has."""
        fields = {
            "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
            "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']": "0",
            "metadata.labels['training.kubeflow.org/replica-index']": str(index),
        }
        [container] = template["spec"]["containers"]
        environ: dict[str, str] = {}
        for entry in container["env"]:
            if "value" in entry:
                environ[entry["name"]] = self.expand(entry["value"], environ)
            elif "fieldRef" in entry["valueFrom"]:
                environ[entry["name"]] = fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
            else:
                reference = entry["valueFrom"]["secretKeyRef"]
                environ[entry["name"]] = self.secrets[reference["name"]][reference["key"]]
        return environ

    @staticmethod
    def expand(text: str, variables: Mapping[str, str]) -> str:
        """`$(NAME)` by its value where there is one, `$$` by `$`, anything else as it is."""
        done, rest = "", text
        while rest:
            before, dollar, rest = rest.partition("$")
            done += before
            name, closing, after = rest[1:].partition(")")
            if rest.startswith("$"):
                done, rest = done + "$", rest[1:]
            elif rest.startswith("(") and closing:
                done, rest = done + variables.get(name, f"$({name})"), after
            else:
                done, rest = done + dollar + rest[:1], rest[1:]
        return done


@pytest.fixture
def kubelet() -> Kubelet:
    return Kubelet()
