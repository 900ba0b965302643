#!/usr/bin/env bash
# From anywhere, on a Ray cluster whose nodes have tl_melbo[cli,ray] installed. The address is that
# of its dashboard; OUT is a folder that all nodes share, or an fsspec URL.
#
#   bash submit.sh http://head:8265 s3://bucket/sweep
set -euo pipefail
cd "$(dirname "$0")"
dashboard=${1:?the address of the cluster\'s dashboard, such as http://head:8265}
out=${2:?a folder that all nodes share, or an fsspec URL}
exec ray job submit --address "$dashboard" --working-dir . -- \
    tl-melbo sweep sweep.yaml --out "$out" --engine ray --address auto
