#!/bin/sh
# One elastic checkpoint, a vLLM server for each of its sizes, one address for all of them.
#
#     ./run.sh CKPT              # sizes "small" and "full"
#     ./run.sh CKPT 12b 23b 30b  # these
#     curl http://127.0.0.1:8000/v1/models
#
# Every server reads its size straight out of CKPT, through the plugin that star-elastic installs
# beside vLLM. Variables: PORT (of the front end; servers take the ones after it), VLLM and
# STAR_ELASTIC (the commands), VLLM_ARGS and FRONT_ARGS (more options for them). Servers that share
# one GPU each want their part of it: VLLM_ARGS='--gpu-memory-utilization 0.3'.
set -eu

checkpoint=${1:?usage: run.sh CKPT [SIZE ...]}
shift
[ $# -gt 0 ] || set -- small full
port=${PORT:-8000}
model=$(basename "$checkpoint")

servers=
front=
stop() {
    trap - EXIT INT TERM
    # the front end first: it finishes what is in flight while the servers still answer
    [ -z "$front" ] || { kill "$front" 2>/dev/null; wait "$front"; } || true
    [ -z "$servers" ] || { kill $servers 2>/dev/null; wait $servers; } || true
}
trap stop EXIT
trap 'stop; exit 0' INT TERM

upstreams=
at=$port
for size in "$@"; do
    at=$((at + 1))
    ${VLLM:-vllm serve} "$checkpoint" --hf-overrides "{\"elastic_size\": \"$size\"}" \
        --served-model-name "$model-$size" --host 127.0.0.1 --port "$at" ${VLLM_ARGS:-} &
    servers="$servers $!"
    upstreams="$upstreams --upstream $size=http://127.0.0.1:$at"
done

# it needs no server to be up: a size is ready when its first server is
${STAR_ELASTIC:-star-elastic} serve "$checkpoint" --port "$port" $upstreams ${FRONT_ARGS:-} &
front=$!
wait "$front"
