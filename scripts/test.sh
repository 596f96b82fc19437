#!/usr/bin/env bash
# Sets everything up where needed, then lints, checks types and runs the tests:
#   bash scripts/test.sh                  all of it
#   bash scripts/test.sh tests -k laws    any arguments of pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need dev
cd "$root"
ruff check .
ruff format --check .
mypy
basedpyright
# Not --quiet: then it would see no warnings.
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict
python scripts/bench peers >/dev/null || echo "no network: tests against other packages will be skipped" >&2
exec python -m pytest -n auto "$@"
