#!/bin/sh
# Starts `slipstream` with the container's arguments: "serve --config ...", "print-config", "version" ...
set -eu

# A key from a file (a Docker or Kubernetes secret) never shows in `docker inspect`.
if [ -n "${SLIPSTREAM_API_KEY_FILE:-}" ]; then
    if [ ! -r "$SLIPSTREAM_API_KEY_FILE" ]; then
        echo "entrypoint: SLIPSTREAM_API_KEY_FILE names $SLIPSTREAM_API_KEY_FILE, which user $(id -u) cannot read" >&2
        exit 2
    fi
    SLIPSTREAM_API_KEY=$(cat "$SLIPSTREAM_API_KEY_FILE")
    export SLIPSTREAM_API_KEY
    unset SLIPSTREAM_API_KEY_FILE
fi

# Models are fetched and converted into the cache. A folder mounted over it keeps its owner on the host.
if [ "${1:-}" = serve ] && ! { mkdir -p "$SLIPSTREAM_CACHE_DIR" && [ -w "$SLIPSTREAM_CACHE_DIR" ]; } 2>/dev/null; then
    echo "entrypoint: user $(id -u) cannot write to $SLIPSTREAM_CACHE_DIR, where models are kept." >&2
    echo "entrypoint: use a named volume (-v models:/var/cache/slipstream), or chown the mounted folder to $(id -u)." >&2
    exit 2
fi

# The image has no C compiler; Triton finds here what it would compile at the first launch of a kernel.
if [ -n "${TRITON_CACHE_DIR:-}" ] && [ -d /opt/slipstream/share/triton ]; then
    mkdir -p "$TRITON_CACHE_DIR"
    cp -R -n /opt/slipstream/share/triton/. "$TRITON_CACHE_DIR"
fi

exec slipstream "$@"
