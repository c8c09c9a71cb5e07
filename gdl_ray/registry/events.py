"""Events of the registry: it tells whoever listens that an alias has moved, or a version is new.

References:
    Standard Webhooks, 2023, whose signatures MLflow's events carry. https://www.standardwebhooks.com
"""

import base64
import hashlib
import hmac
import logging
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.webhook import Webhook, WebhookEventStr
from mlflow.exceptions import MlflowException

from gdl_ray.tracking import RegistryUnavailable, ask, tracking_uri

EVENTS: tuple[WebhookEventStr, ...] = (
    "registered_model.created",
    "model_version.created",
    "model_version_alias.created",
    "model_version_alias.deleted",
    "model_version_tag.set",
    "model_version_tag.deleted",
)
"""What `hook` has the registry tell of. It tells of nothing else yet: not of a model's own tags, nor of what
is deleted, so that whoever listens must look from time to time as well."""

MAX_AGE_S = 300.0
"""Age at which an event is too old to be believed, as Standard Webhooks advise; MLflow tries for less."""

log = logging.getLogger(__name__)


def hook(url: str, secret: str) -> bool:
    """Have the registry POST its events to an address, signed; again with another secret replaces it.

    Args:
        url: of whoever listens; each has one hook.
        secret: signs the events, as `signed` checks. A new one reaches the server's processes within their
            MLFLOW_WEBHOOK_CACHE_TTL.

    Returns:
        Whether it will; the log says why not, for many servers refuse hooks, or those to private addresses.
    """
    try:
        client = MlflowClient(tracking_uri())
        ours = [hook.webhook_id for hook in _hooks(client) if hook.url == url]
        settings: dict[str, Any] = {"events": list(EVENTS), "secret": secret}
        if ours:
            ask(client.update_webhook, ours[0], status="ACTIVE", **settings)
        else:
            ask(client.create_webhook, "gdl_ray", url, **settings)
        for double in ours[1:]:  # two have asked at the same moment
            ask(client.delete_webhook, double)
    except (MlflowException, RegistryUnavailable) as error:
        log.warning("the registry will not tell %s of its events: %s", url, error)
        return False
    return True


def _hooks(client: MlflowClient) -> list[Webhook]:
    """List all hooks that the server has."""
    found: list[Webhook] = []
    page: str | None = ""
    while page is not None:
        hooks = ask(client.list_webhooks, page_token=page or None)
        found += hooks
        page = hooks.token or None
    return found


def signed(headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    """Tell whether an event comes from a registry that knows the secret, and is not an old one sent again.

    Args:
        headers: of the request, in lower case or of a mapping to which case is nothing.
        body: as received, byte for byte.
        secret: that of `hook`.
    """
    identity, sent_s, signatures = (
        headers.get(f"x-mlflow-{name}", "") for name in ("delivery-id", "timestamp", "signature")
    )
    is_time = sent_s.isascii() and sent_s.isdigit() and len(sent_s) <= 12
    if not (is_time and abs(time.time() - int(sent_s)) <= MAX_AGE_S):
        return False
    content = f"{identity}.{sent_s}.".encode() + body
    digest = base64.b64encode(hmac.digest(secret.encode(), content, hashlib.sha256)).decode()
    expected = f"v1,{digest}".encode()
    # There may be several, while a secret is replaced by another.
    return any(hmac.compare_digest(expected, one.encode()) for one in signatures.split())
