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
  ANY_USER_MOUNTED=1 exec unshare --mount --propagation private bash "$0" "$@"
fi

checkout=$PWD
mount --bind "$checkout" "$checkout"
mount -o remount,bind,ro "$checkout"

# A virtual environment's interpreter may lie in root's home, where others may not look. The rest of that home stays hidden.
python=$(readlink -f .venv/bin/python)
as_user=(setpriv "--reuid=$uid" --regid=0 --clear-groups --)
if ! "${as_user[@]}" test -x "$python"; then
  prefix=$(dirname "$(dirname "$python")")
  hidden=/$(cut -d / -f 2 <<<"$prefix")
  mkdir -p /run/any-user-python
  mount --bind "$prefix" /run/any-user-python
  mount -t tmpfs -o mode=755 tmpfs "$hidden"
  mkdir -p "$prefix"
  mount --bind /run/any-user-python "$prefix"
fi

temporary=$(mktemp -d /tmp/any-user-XXXXXX)
trap 'rm -rf "$temporary"' EXIT
chown "$uid:0" "$temporary"
cd "$checkout" # the read-only one
"${as_user[@]}" env -u HOME -u USER -u LOGNAME -u DALLE_REQUIRE_ROOT -u ANY_USER_MOUNTED PYTHONDONTWRITEBYTECODE=1 \
  PYTHONPATH="$checkout/container:$checkout" \
  .venv/bin/python -m pytest -p no:cacheprovider --basetemp "$temporary/pytest" -m "not docker" "$@"
