"""Have a running server's replicas take up another selector, from any process that can reach it over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from adaptivekv.cluster.app import last_line
from adaptivekv.cluster.arguments import absolute, tracking_of
from adaptivekv.errors import AdaptiveKVError

URL = "http://127.0.0.1:8000"


def reload(url: str = URL, api_key: str | None = None, **config: Any) -> dict[str, Any]:
    """Every replica changes between two answers; nothing is dropped. Returns replicas, selector and margin.

    url, api_key: of the server. config: selector, tracking_uri, margin, epsilon and shadow, as Engine.reconfigure takes
    them. AdaptiveKVError: no server there, a wrong key, or a replica that kept its old selector, with its reason.
    """
    config = {key: value for key, value in config.items() if value is not None}
    config |= {key: absolute(str(config[key])) for key in ("selector", "shadow") if key in config}
    if "tracking_uri" in config:
        config["tracking_uri"] = tracking_of(config)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        asked = urllib.request.Request(f"{url.rstrip('/')}/reload", json.dumps(config).encode(), headers)
        with opener.open(asked, timeout=90) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise AdaptiveKVError(f"reload: {_said(error)}") from None
    except (OSError, ValueError) as error:
        raise AdaptiveKVError(
            f"reload: no adaptivekv server answers at {url} ({last_line(error)}); give --url"
        ) from None
    return found


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers {error.code} {error.reason}; is it adaptivekv's?"
