#!/usr/bin/env bash
# Make the image that container/Dockerfile starts from out of Debian packages, where no registry can be reached.
# Elsewhere it is not needed: the Dockerfile's own default is pulled. As root:
#
#   container/base.sh dalle-base:bookworm
#   docker build --build-arg BASE_IMAGE=dalle-base:bookworm -f container/Dockerfile .
#
# An image of that name is kept as it is; `docker image rm` it for a new one. DEBIAN_MIRROR names another mirror.
set -euo pipefail

name=${1:?the name of the image to make, such as dalle-base:bookworm}
docker=${DOCKER:-docker}

if "$docker" image inspect "$name" >/dev/null 2>&1; then
  echo "$name is there already"
  exit 0
fi
command -v debootstrap >/dev/null || { echo "debootstrap is missing: apt-get install debootstrap" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "debootstrap needs root" >&2; exit 1; }

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
  bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$root.log" 2>&1 || { cat "$root.log" >&2; exit 1; }
rm -f "$root.log"

# Nothing of this is read by a program that runs in the image.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
  "$root"/usr/share/{doc,man,info,locale,lintian,bash-completion}/*
find "$root/usr" -name __pycache__ -prune -exec rm -rf {} +
# debootstrap copies the resolver and the name of this machine.
rm -f "$root/etc/resolv.conf" "$root/etc/hostname"
chroot "$root" /usr/bin/python3 -m compileall -q -j 0 /usr/lib/python3.11 || true

tar -C "$root" --numeric-owner --exclude=./dev/* --exclude=./proc/* --exclude=./sys/* -c . |
  "$docker" import --change 'CMD ["bash"]' --change 'ENV LANG=C.UTF-8' - "$name" >/dev/null
echo "made $name: $("$docker" image inspect --format '{{.Size}}' "$name") bytes"
