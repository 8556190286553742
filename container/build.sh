#!/usr/bin/env bash
# Build the image: container/build.sh [NAME]. BASE_IMAGE chooses the base, and anything else after NAME goes to
# `docker build`. Where no registry can be reached, root makes the base from Debian packages.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-dalle-sagemaker}
docker=${DOCKER:-docker}
default=$(sed -nE 's/^ARG BASE_IMAGE=(.*)$/\1/p' container/Dockerfile)

if [ -z "${BASE_IMAGE:-}" ]; then
  BASE_IMAGE=$default
  if ! "$docker" image inspect "$default" >/dev/null 2>&1 && ! timeout 60 "$docker" pull --quiet "$default"; then
    echo "$default cannot be pulled: making a base of Debian packages instead" >&2
    BASE_IMAGE=dalle-base:bookworm
    container/base.sh "$BASE_IMAGE"
  fi
fi

# The certificates by which this machine reaches the package index, for the first stage only.
certificates=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
if [ -r "$certificates" ]; then
  mkdir -p build
  cmp -s "$certificates" build/ca.crt || cp "$certificates" build/ca.crt
fi

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision+=-dirty

# An index of attestations around the image, which newer builders add, is refused by some hosts.
BUILDX_NO_DEFAULT_ATTESTATIONS=1 "$docker" build "${@:2}" \
  --build-arg BASE_IMAGE="$BASE_IMAGE" \
  --build-arg GIT_REVISION="$revision" \
  --build-arg LOCK_SHA256="$(sha256sum requirements/image.txt | cut -d' ' -f1)" \
  --file container/Dockerfile --tag "$name" .
"$docker" image inspect --format "$name: {{.Size}} bytes" "$name"
