#!/usr/bin/env bash
# Makes the oldest environments that setup.py allows, in .cache, and runs the laws of the design in them:
#   bash scripts/floor.sh              of tomesd[diffusers], then of tomesd[vit]
#   bash scripts/floor.sh vit -x       one of them, with any arguments of pytest
# PYTHON names one of the oldest version that is supported. Old wheels of torch bring 3 GB of CUDA along.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export TOMESD_FLOOR=1 OMP_NUM_THREADS=1 PYTHONPATH="$root:$root/tests:$root/tests/laws:$root/scripts/bench"

# The lower bounds that setup.py has for a package, lowest first, as versions.
bounds() { grep -o "\"$1>=[0-9.]*\"" "$root/setup.py" | tr -d '"' | sed 's/>=\(.*\)/==\1.*/' | sort -V; }
first() { for name; do bounds "$name" | head -n 1; done; }
last() { for name; do bounds "$name" | tail -n 1; done; }

floor() {
    local extra=$1 folder="$root/.cache/floor-$1" packages
    shift
    # What they need has to be of their time as well; the tests import both hosts.
    case $extra in
        diffusers)
            packages="$(first torch diffusers transformers accelerate safetensors timm)"
            packages+=" numpy<2 huggingface_hub<0.26"
            ;;
        vit) packages="$(last torch transformers timm) diffusers==0.36.*" ;;
    esac
    if [[ ! -f "$folder/done" ]]; then
        echo "making $folder of" $packages >&2
        "${PYTHON:-python3.10}" -m venv --clear "$folder"
        "$folder/bin/pip" install --quiet --disable-pip-version-check $packages torchvision open_clip_torch \
            einops omegaconf pytest pytest-xdist hypothesis
        touch "$folder/done"
    fi
    cd "$root"
    "$folder/bin/python" -c 'import subjects; print("laws on:", ", ".join(subjects.SUBJECTS))'
    # Only later versions of torch make one graph of all methods, and timm shows the keys of EVA from 1.0.26 on.
    "$folder/bin/python" -m pytest tests/laws tests/maths -n auto -p no:cacheprovider \
        -k "not compile and not graph and not what_a_host_gets and not EVA02" "$@"
}

case "${1:-}" in
    diffusers | vit) floor "$@" ;;
    *) floor diffusers "$@" && floor vit "$@" ;;
esac
