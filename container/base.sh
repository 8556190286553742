#!/usr/bin/env bash
# Make a base image for container/Dockerfile from Debian packages, where no registry can be reached. Needs root.
# Elsewhere the Dockerfile's default base is pulled instead.
#
#   container/base.sh dalle-base:bookworm
#   docker build --build-arg BASE_IMAGE=dalle-base:bookworm -f container/Dockerfile .
#
# An existing image of that name is kept; `docker image rm` it for a new one. DEBIAN_MIRROR names another mirror.
set -euo pipefail

name=${1:?the name of the image to make, such as dalle-base:bookworm}
docker=${DOCKER:-docker}

if "$docker" image inspect "$name" >/dev/null 2>&1; then
  echo "$name exists already"
  exit 0
fi
command -v debootstrap >/dev/null || { echo "debootstrap is missing: apt-get install debootstrap" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "debootstrap needs root" >&2; exit 1; }

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
  bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$root.log" 2>&1 || { cat "$root.log" >&2; exit 1; }
rm -f "$root.log"

# Remove files that no program in the image reads.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
  "$root"/usr/share/{doc,man,info,locale,lintian,bash-completion}/*
find "$root/usr" -name __pycache__ -prune -exec rm -rf {} +
# Remove this machine's resolver and host name, which debootstrap copies.
rm -f "$root/etc/resolv.conf" "$root/etc/hostname"
chroot "$root" /usr/bin/python3 -m compileall -q -j 0 /usr/lib/python3.11 || true

tar -C "$root" --numeric-owner --exclude=./dev/* --exclude=./proc/* --exclude=./sys/* -c . |
  "$docker" import --change 'CMD ["bash"]' --change 'ENV LANG=C.UTF-8' - "$name" >/dev/null
echo "made $name: $("$docker" image inspect --format '{{.Size}}' "$name") bytes"
