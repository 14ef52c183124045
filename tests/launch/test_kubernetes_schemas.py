"""The documents against the real schemas, with unknown keys refused.

Those of Kubernetes come with a package; `schemas/` has what is needed of the definitions of JobSet,
Kubeflow's Trainer and its Training Operator. A schema does not know the rules of the controllers
and webhooks behind it: test_kubernetes.py states those.
"""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launch.kubernetes import documents, manifest, pod
from launch.kubernetes.settings import KINDS, Settings, Volume

# The first whose schema takes a rule with exit codes alone, and the last one that there is.
VERSIONS = ["1.29", "1.31", "1.34", "1.37"]
SCHEMAS = {
    schema["properties"]["kind"]["const"]: schema
    for schema in (
        json.loads(path.read_text())
        for path in sorted((Path(__file__).parent / "schemas").glob("*.json"))
    )
}
MODEST = {"name": "a", "image": "mnist:1", "workers": 2}
LAVISH = {
    "name": "mnist",
    "image": "mnist:1",
    "workers": 12,
    "namespace": "ml",
    "token_secret": "token",
    "volumes": (Volume("runs", "/runs"), Volume("data", "/data")),
    "cpu": "4",
    "memory": "8Gi",
    "gpus": 2,
    "labels": {"team": "a"},
    "pull_policy": "Always",
    "pull_secrets": ("registry",),
    "grace_period_s": 90,
}


def plan(kind, wishes):
    """The documents as they are read from the text."""
    settings = Settings(kind=kind, **wishes)
    found = documents.plan(pod.job(("dist-train", "--lr=1"), settings), settings)
    return list(yaml.safe_load_all(manifest.text(found)))


def pod_templates(value):
    """All pod templates within a document."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        for inner in value.values():
            yield from pod_templates(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_templates(inner)


def check(document, version):
    """Raises ValidationError where a document does not fit its schema."""
    schema = SCHEMAS.get(document["kind"])
    if schema is None:
        kubernetes_validate.validate(document, version, strict=True)
        return
    jsonschema.Draft202012Validator(schema).validate(document)
    metadata = {"name": "a"}
    as_core = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata}
    for template in pod_templates(document):
        kubernetes_validate.validate({**as_core, "template": template}, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wishes", [MODEST, LAVISH], ids=["modest", "lavish"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_fit_their_schemas(kind, wishes, version):
    found = plan(kind, wishes)
    assert sum(1 for document in found for _ in pod_templates(document)) == 1
    for document in found:
        check(document, version)


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_job_of_a_jobset_fits_the_schema_of_a_job(kind):
    found = {document["kind"]: document for document in plan(kind, LAVISH)}
    jobset = found.get("JobSet") or found["TrainingRuntime"]["spec"]["template"]
    [replicated_job] = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
    job["spec"] = replicated_job["template"]["spec"]
    kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_these_checks_find_a_misspelt_key(kind):
    for document in plan(kind, MODEST):
        check(document, VERSIONS[-1])
        for changed in (document["spec"], *(t["spec"] for t in pod_templates(document))):
            changed["replicaz"] = 1
            with pytest.raises(jsonschema.ValidationError, match="replicaz"):
                check(document, VERSIONS[-1])
            del changed["replicaz"]
