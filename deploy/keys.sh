#!/bin/sh
# Writes each key into the volume of the services that need it. Keys come from .env, or are made at the
# first start and kept.
set -eu
keys=${1:-/keys}

write() { # FILE VALUE
  # Every service that reads it runs as a user of its own.
  printf %s "$2" >"$1.new"
  chmod 0444 "$1.new"
  mv "$1.new" "$1"
}

keep() { # FILE VALUE
  value=$2
  if [ -z "$value" ]; then
    if [ -s "$1" ]; then return; fi
    value=$(head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1)
  fi
  write "$1" "$value"
}

# The proxy would read a star as a wildcard. A header may hold these characters only (RFC 6750).
check() { # NAME VALUE
  case $2 in
    *[!A-Za-z0-9._~+/=-]*)
      echo "$1 must be of letters, digits and -._~+/= only: change it, or leave it empty" >&2
      exit 1
      ;;
  esac
}
check API_KEY "${API_KEY:-}"
check PREVIOUS_API_KEY "${PREVIOUS_API_KEY:-}"

keep "$keys/api/key" "${API_KEY:-}"
if [ -n "${PREVIOUS_API_KEY:-}" ]; then
  write "$keys/api/previous-key" "$PREVIOUS_API_KEY"
else
  rm -f "$keys/api/previous-key"
fi
# The proxy sends this key to the server; no client knows it.
keep "$keys/server/key" ""
keep "$keys/grafana/password" "${GRAFANA_PASSWORD:-}"
# A new volume belongs to root, and the proxy keeps its certificates in this one.
chmod 0777 "$keys/certificates"
