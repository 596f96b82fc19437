#!/usr/bin/env bash
# Tests the page of `tomesd app`, in a browser too, in an environment of its own in .cache/app: gradio wants
# an older Pillow than other packages have. The browser is the system's chromium (apt-get install chromium).
#   bash scripts/test_app.sh              any arguments of pytest
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$root/.cache/app"
if [[ ! -f "$folder/done" ]]; then
    "${PYTHON:-python3}" -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" \
        -e "$root[app]" playwright pytest
    touch "$folder/done"
fi
cd "$root"
exec "$folder/bin/python" -m pytest tests/tools/test_app.py -rs "$@"
