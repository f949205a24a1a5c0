"""The server's health check. Kills a server that was healthy and no longer answers.

Docker marks a container as unhealthy and lets it run. After HEALTH_MAX_FAILURES failures in a row,
if that is set, this check kills all processes of the container but the first. The container then
stops, and its restart policy starts it again. A server that is starting is left alone, and so is a
server that drains, which sends Retry-After.
"""

import os
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

URL = os.environ.get("HEALTH_URL", "http://127.0.0.1:8000/health")
TIMEOUT_SECONDS = 4
FAILURES = Path(tempfile.gettempdir()) / "health-failures"
"""Exists once the server was healthy, and holds the failures since."""


def main() -> int:
    """Return 0 if the server is healthy, 1 if not."""
    try:
        urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        is_draining = isinstance(error, urllib.error.HTTPError) and "Retry-After" in error.headers
        print(error, file=sys.stderr)
        if not is_draining:
            count_failure()
        return 1
    FAILURES.write_text("0")
    return 0


def count_failure() -> None:
    """Count a failure, and kill the server at HEALTH_MAX_FAILURES."""
    max_failures = int(os.environ.get("HEALTH_MAX_FAILURES") or 0)
    if not FAILURES.exists() or not max_failures:
        return
    num_failures = int(FAILURES.read_text() or 0) + 1
    FAILURES.write_text(str(num_failures))
    if num_failures >= max_failures:
        FAILURES.unlink()
        message = f"{num_failures} failures in a row: the server is killed"
        print(message, file=sys.stderr, flush=True)
        # All processes of this user but this one and the first, which is Docker's init.
        os.kill(-1, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
