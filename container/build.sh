#!/usr/bin/env bash
# Build the image: container/build.sh [NAME [ARGUMENT…]]. The arguments go to `docker build`; BASE_IMAGE chooses the base.
# Where the default base cannot be pulled, root makes one from Debian packages.
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

# Certificates for the package index, used in the first stage only.
certificates=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
if [ -r "$certificates" ]; then
  mkdir -p build
  cmp -s "$certificates" build/ca.crt || cp "$certificates" build/ca.crt
fi

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision+=-dirty

# Newer builders wrap the image in an index of attestations, which some hosts refuse.
BUILDX_NO_DEFAULT_ATTESTATIONS=1 "$docker" build "${@:2}" \
  --build-arg BASE_IMAGE="$BASE_IMAGE" \
  --build-arg GIT_REVISION="$revision" \
  --build-arg LOCK_SHA256="$(sha256sum requirements/image.txt | cut -d' ' -f1)" \
  --file container/Dockerfile --tag "$name" .
"$docker" image inspect --format "$name: {{.Size}} bytes" "$name"
