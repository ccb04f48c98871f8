"""Is the service here alive, or ready? For HEALTHCHECK and probes that run a command; no curl.

    python probe.py [/livez|/readyz] [PORT]

Status: 0 it said 200, 1 it did not. Over HTTPS where `DERMAFLUX_TLS_CERT` is set: the certificate
is not checked, for it is of the machine's name and asked by its loopback address. With
`DERMAFLUX_TLS_CA` callers have to show a certificate; PROBE_CERT and PROBE_KEY name one. Without
them /livez takes the refusal of the handshake for a sign of life, and /readyz fails.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

SECONDS = 5.0


def alive(path: str, port: int, environment: dict[str, str]) -> bool:
    """Whether `path` answers 200 on this machine."""
    connection: http.client.HTTPConnection
    if environment.get("DERMAFLUX_TLS_CERT"):
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if environment.get("PROBE_CERT"):
            context.load_cert_chain(environment["PROBE_CERT"], environment.get("PROBE_KEY"))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", port, timeout=SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    mutual = bool(environment.get("DERMAFLUX_TLS_CA")) and not environment.get("PROBE_CERT")
    try:
        if mutual and path == "/livez":
            # Nothing is asked: of a connection that is closed with a request in it unread, the
            # refusal may be lost.
            connection.connect()
            connection.sock.recv(1)
            return False
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except ssl.SSLError as error:
        # Sent by a process that runs: "certificate required".
        return mutual and path == "/livez" and "CERTIFICATE_REQUIRED" in str(error).upper()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 else "/livez"
    number = int(sys.argv[2] if len(sys.argv) > 2 else os.environ.get("PORT", "3000"))
    sys.exit(0 if alive(asked, number, dict(os.environ)) else 1)
