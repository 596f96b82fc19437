# Sourced by the other scripts: `need EXTRA` makes sure that tomesd[EXTRA] of this checkout is installed.
# Without an active virtual or conda environment it makes and uses .venv in the root of the repository.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

need() {
    local extra=$1 missing
    if [[ ! -x "${VIRTUAL_ENV:-}/bin/python" && (-z "${CONDA_PREFIX:-}" || "${CONDA_DEFAULT_ENV:-}" == base) ]]; then
        # The last file that venv makes: without it, somebody has stopped it half way.
        if [[ ! -f "$root/.venv/bin/activate" ]]; then
            local python="${PYTHON:-python3}"
            if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
                echo "tomesd needs Python 3.10 or later, $python is not: PYTHON=python3.12 bash $0" >&2
                return 1
            fi
            echo "making a virtual environment in $root/.venv" >&2
            "$python" -m venv --clear "$root/.venv"
        fi
        source "$root/.venv/bin/activate"
    fi
    # Looking at names and versions takes a moment, importing or installing packages much longer.
    missing="$(python -I "$root/scripts/missing.py" "$extra")"
    if [[ -n "$missing" ]]; then
        echo "installing tomesd[$extra], missing: ${missing//$'\n'/, }" >&2
        python -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$extra]" >&2
    fi
}
