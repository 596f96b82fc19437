#!/usr/bin/env bash
# Sets everything up where needed, then runs `tomesd generate`:
#   bash scripts/generate.sh                              compares plain and merged, offline
#   bash scripts/generate.sh "red apple" "blue heart"     any arguments of `generate`
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need diffusers
(($#)) || set -- --compare
exec python -m tomesd generate "$@"
