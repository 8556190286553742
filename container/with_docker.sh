#!/usr/bin/env bash
# Run a command with a Docker engine: container/with_docker.sh make test-image
# On a bare Debian machine, as root, it installs missing packages and starts an engine, which it stops again however the
# command ends. Images and build layers stay on the disk.
set -euo pipefail

docker=${DOCKER:-docker}
missing=()
command -v dockerd >/dev/null || "$docker" info >/dev/null 2>&1 || missing+=(docker.io iptables)
command -v docker-compose >/dev/null || "$docker" compose version >/dev/null 2>&1 || missing+=(docker-compose)
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

engine=
log=
command=
set -m  # separate process groups: Ctrl-C reaches this script alone, which passes it on

# end SIGNAL PID…: send the signal to the first process (to its group, where PID begins with a minus) and wait for all of
# them. After 30 seconds send the first SIGTERM, after 60 seconds send all of them SIGKILL.
end() {
  local signal
  for signal in "$1" TERM KILL; do
    if [ "$signal" = KILL ]; then kill -KILL -- "${@:2}" 2>/dev/null; else kill "-$signal" -- "$2" 2>/dev/null; fi || true
    for _ in $(seq 150); do
      kill -0 -- "${@:2}" 2>/dev/null || return 0
      sleep 0.2
    done
  done
}

stop() {
  local status=$?
  trap - EXIT INT TERM HUP
  if [ -n "$command" ]; then
    end INT "-$command"  # like Ctrl-C, on which tests remove their containers
  fi
  if [ -n "$engine" ]; then
    # The engine stops its containers. Its containerd has another session, so wait for it too.
    # shellcheck disable=SC2046
    end TERM "$engine" $(pgrep -P "$engine")
    rm -f "$log"
  fi
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if ! "$docker" info >/dev/null 2>&1; then
  [ "$(id -u)" = 0 ] || { echo "no Docker engine answers, and starting one needs root" >&2; exit 1; }
  log=$(mktemp)
  dockerd >"$log" 2>&1 </dev/null &
  engine=$!
  for _ in $(seq 150); do
    "$docker" info >/dev/null 2>&1 && break
    kill -0 "$engine" 2>/dev/null || break
    sleep 0.2
  done
  "$docker" info >/dev/null || { tail -n 20 "$log" >&2; exit 1; }
fi

"$@" </dev/null &
command=$!
status=0
wait "$command" || status=$?
command=
exit "$status"
