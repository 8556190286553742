#!/usr/bin/env bash
# Runs the tests as a user id without a name and a home, on a read-only checkout: `make test-any-user`. Only /tmp is
# writable, as on a host that gives a container any user id and mounts its code. Needs root, for a mount namespace of its own.
# Arguments are pytest's. Tests that need root are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
uid=${ANY_USER_ID:-12345}

if [ "$(id -u)" != 0 ]; then
  echo "test-any-user needs root, to become another user and to mount the checkout read-only: sudo make test-any-user" >&2
  exit 1
fi
if getent passwd "$uid" >/dev/null; then
  echo "the user id $uid has a name here; give another one: ANY_USER_ID=54321" >&2
  exit 1
fi

if [ -z "${ANY_USER_MOUNTED:-}" ]; then
  ANY_USER_MOUNTED=1 exec unshare --mount --propagation private bash tests/any_user.sh "$@"
fi

checkout=$PWD
python=$(readlink -f .venv/bin/python)
as_user=(setpriv "--reuid=$uid" --regid=0 --clear-groups --)

# The checkout or the interpreter may lie in a home where others may not look: there they alone are shown.
needed=("$checkout" "$(readlink -f .venv)" "$(dirname "$(dirname "$python")")")
hidden=()
for folder in "${needed[@]}"; do
  if ! "${as_user[@]}" test -x "$folder"; then hidden+=("/$(cut -d / -f 2 <<<"$folder")"); fi
done
if [ ${#hidden[@]} -gt 0 ]; then
  mount -t tmpfs tmpfs /mnt
  for number in "${!needed[@]}"; do
    mkdir "/mnt/$number"
    mount --bind "${needed[$number]}" "/mnt/$number"
  done
  for top in $(printf '%s\n' "${hidden[@]}" | sort -u); do mount -t tmpfs -o mode=755 tmpfs "$top"; done
  for number in "${!needed[@]}"; do
    if [ ! -e "${needed[$number]}" ]; then
      mkdir -p "${needed[$number]}"
      mount --bind "/mnt/$number" "${needed[$number]}"
    fi
  done
fi
mount --bind "$checkout" "$checkout"
mount -o remount,bind,ro "$checkout"

temporary=$(mktemp -d /tmp/any-user-XXXXXX)
trap 'rm -rf "$temporary"' EXIT
chown "$uid:0" "$temporary"
cd "$checkout" # the read-only one
"${as_user[@]}" env -u HOME -u USER -u LOGNAME -u DALLE_REQUIRE_ROOT -u ANY_USER_MOUNTED PYTHONDONTWRITEBYTECODE=1 \
  GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory "GIT_CONFIG_VALUE_0=*" \
  PYTHONPATH="$checkout/container:$checkout" \
  .venv/bin/python -m pytest -p no:cacheprovider --basetemp "$temporary/pytest" -m "not docker" "$@"
