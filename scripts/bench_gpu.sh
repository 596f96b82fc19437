#!/usr/bin/env bash
# Every figure that a GPU can give, the most telling first, as CSVs, tables and plots in a folder, in half an hour:
#   bash scripts/bench_gpu.sh                    all parts, into outputs/gpu
#   bash scripts/bench_gpu.sh FOLDER unet ops    some of them
#   TOY=1 bash scripts/bench_gpu.sh FOLDER       all of them in small, on a CPU: whether each one runs
# A part that fails, or has not ended after MINUTES (8), leaves its log; the others go on, and the exit code is 1.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${1:-$root/outputs/gpu}"
(($#)) && shift
all=(unet 4k sdxl compiled tune vit ops block)
for name in "$@"; do
    if [[ " ${all[*]} " != *" $name "* ]]; then
        echo "bench_gpu.sh: there is no part $name, only ${all[*]}" >&2
        exit 2
    fi
done
(($#)) || set -- "${all[@]}"
mkdir -p "$folder" || exit 2
# From any folder, this checkout of tomesd.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

small() { [[ -z "${TOY:-}" ]] || printf '%s\n' "$@"; }
# Runs a command; in small with the options after `--`, which win as they come last.
try() {
    local call=()
    while [[ $1 != -- ]]; do call+=("$1") && shift; done
    mapfile -t -O ${#call[@]} call < <(small "${@:2}")
    timeout "${MINUTES:-8}m" python "${call[@]}" || failed=1
}
bench() { try "$root/scripts/bench" "$@"; }
# SD 1.5 in bfloat16, unless told.
speed() {
    local csv="$1" few="" && shift
    [[ $* != *--compile* ]] || few="--level block --ways windowed"
    bench speed --csv "$folder/$csv.csv" --dtypes bfloat16 --rounds 5 "$@" \
        -- --device cpu --model tiny --sizes 640x128 --rounds 2 $few
}
draw() { try -m tomesd generate-4k --out "$folder" "$@" -- --device cpu --size 32x64 --steps 3; }

part() {
    local failed=0
    case $1 in
        unet) # copy: the same without linear unmerge
            speed unet --level unet --sizes 512 1024 2048 3840x2176 \
                --ways tomesd-0.1.3 todo hypertile ideal windowed copy keys merge-keys ideal-stage stage
            ;;
        4k) # fifty steps, plain and with keys; then in both ways that save most
            if [[ -n "${TOY:-}" ]]; then draw fire --model emoji --direct --compare; else draw --random --compare; fi
            speed 4k --level unet --sizes 3840x2176 --ratios 0.75 \
                --ways tomesd-0.1.3 ideal windowed 4k ideal-4k-stage 4k-stage
            ;;
        sdxl)
            speed sdxl --level unet --model sdxl --sizes 1024 2048 \
                --ways tomesd-0.1.3 todo ideal windowed keys merge-keys ideal-stage-4 stage-4
            ;;
        compiled)
            speed compiled --level unet --compile --channels-last --sizes 512 1024 2048 \
                --ways ideal windowed copy keys merge-keys stage
            speed compiled-sdxl --level unet --model sdxl --compile --channels-last --sizes 1024 \
                --ways windowed keys stage-4
            ;;
        tune) try -m tomesd tune --error 0.01 --fresh --out "$folder/recipe.json" -- --device cpu --size 32 --steps 2 ;;
        vit)
            bench vit --csv "$folder/vit.csv" --plot "$folder/vit.png" --dtypes bfloat16 \
                --models vit_base_patch16 vit_large_patch16 --sizes 224 384 --batches 1 256 \
                -- --device cpu --models vit_tiny_patch16_224@64 --batches 2 --rounds 2
            ;;
        ops) # proportional attention by a mask against that by channels (KeyBias)
            bench ops --csv "$folder/ops.csv" --device cuda --dtype bfloat16 \
                -- --device cpu --sizes 8 --tokens 17 --rounds 1
            ;;
        block) speed block --sizes 512 1024 2048 3840x2176 ;;
        *) echo "no part is called $1: ${all[*]}" && failed=2 ;;
    esac
    return $failed
}

code=0
for name; do
    echo "== $name"
    part "$name" 2>"$folder/$name.err" | tee "$folder/$name.txt"
    if ((PIPESTATUS[0])); then
        code=1
        echo "$name failed: $(tail -n 1 "$folder/$name.err")" >&2
    fi
    for csv in "$folder/$name"*.csv; do
        [[ -s $csv && $name != vit && $name != ops ]] || continue
        python "$root/scripts/bench" plot "$csv" --out "${csv%.csv}.png" || code=1
    done
done
exit $code
