# Sourced by the other scripts: `need EXTRA MODULE...` makes sure that tomesd[EXTRA] is installed.
# Without an active virtual environment it makes and uses .venv in the root of the repository.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

need() {
    local extra=$1
    shift
    if [[ -z "${VIRTUAL_ENV:-}" ]]; then
        if [[ ! -x "$root/.venv/bin/python" ]]; then
            echo "making a virtual environment in $root/.venv" >&2
            "${PYTHON:-python3}" -m venv "$root/.venv"
        fi
        source "$root/.venv/bin/activate"
    fi
    # Looking for modules takes a moment, importing or installing them much longer.
    if ! python -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; then
        echo "installing tomesd[$extra]" >&2
        python -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$extra]" >&2
    fi
}
