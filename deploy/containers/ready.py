#!/usr/bin/env python3
"""Whether the server in this container can steer: exit code 0 if it can, else 1 and the reason.

Kubernetes and container engines run it as a command, because their own HTTP probes cannot send the
API key that vLLM asks for on everything under /v1. Standard library only; it starts in a moment.
"""

import os
import sys
import urllib.request

PATHS = ("/health", "/v1/models", "/v1/steering/capabilities")
"""The engine lives; the model is loaded; Headway is on."""

SECONDS = 5.0


def main(port: str) -> int:
    """Ask every path. `VLLM_API_KEY` is the key, if there is one."""
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Through no proxy, whatever the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path in PATHS:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        try:
            opener.open(request, timeout=SECONDS).close()
        except OSError as error:  # urllib's errors are of this kind, timeouts too
            print(f"{path}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HEADWAY_PORT", "8000")))
