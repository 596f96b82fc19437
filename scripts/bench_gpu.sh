#!/usr/bin/env bash
# Every speed figure that a GPU can give, as CSVs, tables and plots in a folder:
#   bash scripts/bench_gpu.sh                                  all parts, into outputs/gpu
#   bash scripts/bench_gpu.sh FOLDER block unet sdxl 4k compiled ops vit  some of them
# A part that fails leaves its log and the others go on; the exit code is that of the last one to fail.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${1:-$root/outputs/gpu}"
(($#)) && shift
(($#)) || set -- block unet sdxl 4k compiled ops vit
mkdir -p "$folder"
bench() { python "$root/scripts/bench" "$@"; }
speed() { bench speed --dtypes bfloat16 "$@"; }
# From any folder, this checkout of tomesd.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

part() {
    case $1 in
        block) speed --csv "$folder/block.csv" --sizes 512 1024 2048 3840x2176 ;;
        unet) speed --csv "$folder/unet.csv" --level unet --sizes 512 1024 2048 3840x2176 4096 ;;
        sdxl) speed --csv "$folder/sdxl.csv" --level unet --model sdxl --sizes 1024 2048 4096 ;;
        4k)
            speed --csv "$folder/4k.csv" --level unet --sizes 3840x2176 --ratios 0.5 0.75 --rounds 5 \
                --ways tomesd-0.1.3 ideal windowed keys 4k ideal-4k-stage 4k-stage
            python -m tomesd generate-4k --random --compare --out "$folder"
            python -m tomesd generate-4k --random --method merge-stage --out "$folder"
            ;;
        compiled)
            speed --csv "$folder/compiled.csv" --level unet --compile --sizes 512 1024 2048 --rounds 5 \
                --ways ideal windowed 0.1.3 keys merge-keys ideal-stage stage
            ;;
        ops) bench ops --device cuda --dtype bfloat16 ;;
        vit) bench vit --device cuda --csv "$folder/vit.csv" --plot "$folder/vit.png" ;;
        *) echo "no part is called $1: block unet sdxl 4k compiled ops vit" && return 2 ;;
    esac
}

code=0
for name; do
    echo "== $name"
    part "$name" 2>"$folder/$name.err" | tee "$folder/$name.txt" || { code=$?; tail -n 3 "$folder/$name.err"; }
    if [[ -s "$folder/$name.csv" && $name != vit ]]; then
        bench plot "$folder/$name.csv" --out "$folder/$name.png"
    fi
done
exit $code
