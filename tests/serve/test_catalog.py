"""The catalog's application, and that it documents what the models' application does."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from serve import api
from serve.catalog import Catalog, Entry, build_app


@pytest.fixture
def catalog() -> Catalog:
    entries = {
        "digits-vae": Entry(name="digits-vae", version=2, served=1, path="/v1/models/digits-vae"),
        "digits-gan": Entry(
            name="digits-gan", version=1, failure="it is damaged", path="/v1/models/digits-gan"
        ),
    }
    return Catalog(entries)


@pytest.fixture
def client(catalog: Catalog) -> TestClient:
    return TestClient(build_app(catalog))


def test_models_are_listed_by_name(catalog: Catalog, client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [model["name"] for model in listed["models"]] == ["digits-gan", "digits-vae"]
    assert listed["models"][1]["served"] == 1
    assert listed["registry_failure"] is None
    catalog.registry_failure = "MLflow does not answer"
    assert client.get("/v1/models").json()["registry_failure"] == "MLflow does not answer"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/nope"),
        ("POST", "/v1/models/nope/sample"),
        ("POST", "/v1/models/nope/log_likelihood"),
        ("PUT", "/v1/models/nope/anything/else"),
    ],
)
def test_an_unknown_model_is_told_from_the_known(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, path, content=b"{ not json")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert "'nope': there are digits-gan, digits-vae" in response.json()["detail"]


def test_a_known_model_without_application_says_why(client: TestClient) -> None:
    response = client.post("/v1/models/digits-gan/sample")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert "it is damaged" in response.json()["detail"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("DELETE", "/v1/models", 405)])
def test_errors_are_problem_documents(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert api.ProblemDocument.model_validate(response.json()).status == status


def test_the_index_leads_to_the_documentation(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/").url.path == "/docs"


def test_the_documentation_is_that_of_the_typed_requests(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    body: Any = paths["/v1/models/{name}/sample"]["post"]["requestBody"]["content"]["application/json"]
    assert set(body["schema"]["properties"]) == set(api.SampleRequest.model_fields)
    assert body["schema"]["properties"]["n"]["maximum"] == api.MAX_SAMPLES
    for example in body["examples"].values():
        api.SampleRequest.model_validate(example["value"])
    body = paths["/v1/models/{name}/log_likelihood"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        api.LikelihoodRequest.model_validate(example["value"])
    answers = paths["/v1/models/{name}/sample"]["post"]["responses"]
    assert set(answers) >= {"200", "404", "413", "422", "429"}
    assert set(answers["200"]["content"]) >= set(api.MEDIA_TYPES.values())
