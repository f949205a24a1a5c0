#!/bin/sh
# Health check of services with images of others: requests a URL. After HEALTH_MAX_FAILURES failures in
# a row it kills all processes of the container but the first, so that the restart policy starts it
# again. A service that is starting is left alone.
url=$1
failures=/tmp/health-failures
if wget -q -T 4 -t 1 -O /dev/null "$url"; then
  echo 0 >"$failures"
  exit 0
fi
if [ -z "${HEALTH_MAX_FAILURES:-}" ] || [ ! -e "$failures" ]; then exit 1; fi
count=$(($(cat "$failures") + 1))
echo "$count" >"$failures"
if [ "$count" -ge "$HEALTH_MAX_FAILURES" ]; then
  rm -f "$failures"
  echo "$count failures in a row: the service is killed" >&2
  kill -KILL -1
fi
exit 1
