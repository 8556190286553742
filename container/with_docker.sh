#!/usr/bin/env bash
# Run a command with a Docker engine: container/with_docker.sh make test-image
# On a bare Debian machine, as root, it installs what is missing and starts the engine, and afterwards stops the one it
# started. Images and build layers stay on the disk for the next time.
set -euo pipefail

docker=${DOCKER:-docker}
missing=()
command -v dockerd >/dev/null || "$docker" info >/dev/null 2>&1 || missing+=(docker.io iptables)
command -v docker-compose >/dev/null || missing+=(docker-compose)
command -v debootstrap >/dev/null || missing+=(debootstrap)
command -v ps >/dev/null || missing+=(procps)
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing: ${missing[*]}; they are Debian packages, and installing them needs root" >&2
    exit 1
  fi
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

if ! "$docker" info >/dev/null 2>&1; then
  [ "$(id -u)" = 0 ] || { echo "no Docker engine answers, and starting one needs root" >&2; exit 1; }
  log=$(mktemp)
  setsid nohup dockerd >"$log" 2>&1 </dev/null &
  engine=$!
  stop() {
    kill "$engine" 2>/dev/null && wait "$engine" 2>/dev/null || true
    rm -f "$log"
  }
  trap stop EXIT
  for _ in $(seq 150); do
    "$docker" info >/dev/null 2>&1 && break
    kill -0 "$engine" 2>/dev/null || break
    sleep 0.2
  done
  "$docker" info >/dev/null || { tail -n 20 "$log" >&2; exit 1; }
fi

"$@"
