"""The HTTP client: samples and likelihoods of served models as numpy arrays.

from gdl_ray.client import Client

images = Client("http://127.0.0.1:8000").sample("digits-vae", n=16, seed=7)     # uint8 (16, 1, 8, 8)
"""

import io
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray


class ServerProblem(Exception):  # noqa: N818  (the RFC's word)
    """The server answered with an error; the message says what is wrong and what to do."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        """The HTTP status."""


class Client:
    """Talks to a gdl_ray server; one client may be shared by threads.

    Args:
        url: where the server listens, such as http://127.0.0.1:8000.
        timeout_s: longest wait for an answer, in seconds.
    """

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout_s)

    def models(self) -> list[dict[str, Any]]:
        """List the models: name, version, what they are measured to be.

        Raises:
            ServerProblem: the server refuses.
            httpx.TransportError: the server does not answer.
        """
        listed: list[dict[str, Any]] = self._request("GET", "/v1/models").json()["models"]
        return listed

    def card(self, model: str) -> dict[str, Any]:
        """Describe a model: what it is, what it can do, its options and their ranges.

        Raises:
            ServerProblem: the server refuses.
            httpx.TransportError: the server does not answer.
        """
        card: dict[str, Any] = self._request("GET", f"/v1/models/{quote(model, safe='')}").json()
        return card

    def sample(
        self, model: str, n: int = 16, seed: int | None = None, label: int | None = None, **options: float
    ) -> NDArray[np.uint8] | NDArray[np.int64]:
        """Draw samples.

        Args:
            model: a name that `models` lists.
            n: how many.
            seed: in [0, 2**53 - 1]; the same seed and model version give the same samples. Random if None.
            label: the class to draw; any if None.
            options: options of the model, such as guidance=2 or steps=50; its card lists them.

        Returns:
            Images, uint8 (n, C, H, W), or tokens, int64 (n, T), in [0, levels - 1].

        Raises:
            ServerProblem: the server refuses.
            httpx.TransportError: the server does not answer.
        """
        asked = {"n": n, "seed": seed, "label": label, "format": "npy", **options}
        response = self._request("POST", f"/v1/models/{quote(model, safe='')}/sample", asked)
        array: NDArray[np.uint8] | NDArray[np.int64] = np.load(
            io.BytesIO(response.content), allow_pickle=False
        )
        return array

    def log_likelihood(
        self,
        model: str,
        x: NDArray[Any],
        labels: NDArray[np.int64] | None = None,
        samples: int = 1,
        seed: int = 0,
    ) -> NDArray[np.float64]:
        """Compute log p(x), or log p(x | label).

        Args:
            model: a name that `models` lists.
            x: integers (B, C, H, W) or (B, T) in [0, levels - 1].
            labels: classes, (B,).
            samples: Monte-Carlo samples per example; more tighten a bound or an estimate.
            seed: decides the noise, in [0, 2**53 - 1].

        Returns:
            Nats per example, (B,); the model's card says whether they are exact, a bound or an estimate.

        Raises:
            ServerProblem: the server refuses.
            httpx.TransportError: the server does not answer.
        """
        asked = {
            "x": x.tolist(),
            "labels": None if labels is None else labels.tolist(),
            "samples": samples,
            "seed": seed,
        }
        response = self._request("POST", f"/v1/models/{quote(model, safe='')}/log_likelihood", asked)
        return np.array(response.json()["nats"])

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        response = self._http.request(method, path, json=body)
        if response.is_success:
            return response
        if response.headers.get("content-type") == "application/problem+json":
            raise ServerProblem(response.status_code, response.json()["detail"])
        raise ServerProblem(
            response.status_code, f"{response.url} answered {response.status_code} {response.reason_phrase}"
        )
