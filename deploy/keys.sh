#!/bin/sh
# Leaves the API key and Grafana's password where only the services that need them look: those of
# .env, or ones made at the first start and kept.
set -eu
keys=${1:-/keys}

keep() { # FILE VALUE
  value=$2
  if [ -z "$value" ]; then
    if [ -s "$1" ]; then return; fi
    value=$(head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1)
  fi
  # Each of the services that read it has a user of its own.
  printf %s "$value" >"$1.new"
  chmod 0444 "$1.new"
  mv "$1.new" "$1"
}

# The proxy would read a star as "anything", and a header holds no more than these (RFC 6750).
case ${API_KEY:-} in
  *[!A-Za-z0-9._~+/=-]*)
    echo "API_KEY must be of letters, digits and -._~+/= only: change it, or leave it empty and one is made" >&2
    exit 1
    ;;
esac
keep "$keys/api/key" "${API_KEY:-}"
keep "$keys/grafana/password" "${GRAFANA_PASSWORD:-}"
