#!/usr/bin/env bash
# Builds for this machine's GPU, checks and measures, in two calls of a few minutes each.
#
#   bench/gpu.sh smoke   [--out FOLDER] [--seconds 150] [--dry-run] [--no-build] [--no-tests]
#   bench/gpu.sh measure [--out FOLDER] [--seconds 420] [--dry-run] [--no-build] [--quick] [--only STAGE]
#   bench/gpu.sh [--out FOLDER] [--dry-run]      both, one after the other
#   --commit HASH with either: the commit of this checkout, if git cannot tell
#
# smoke: builds, compares each kernel with the reference and a tiny cache and query with the CPU's, runs
# compute-sanitizer and the tests. measure: times caching, then each kernel against the GPU's limits; it builds
# what is missing. Needs no network and installs nothing. FOLDER (bench/results, or RAPIDIN_BENCH_OUT) gets
# smoke-<device>.jsonl, gpu-<device>.json and logs; rows are written as they come, so a call that is cut short keeps
# its results. --dry-run does the same on a machine without a GPU, at tiny sizes, by default into a temporary
# folder. PYTHON=... selects the interpreter, RAPIDIN_CUDA_ARCHS the architectures (by default only this GPU's).
# Exits with 1 if something failed, 2 if it could not start.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
case ${1:-} in
    smoke | measure) calls=("$1") && shift ;;
    *) calls=(smoke measure) ;;
esac
out=${RAPIDIN_BENCH_OUT:-}
for option in "$@"; do
    [[ $option == --dry-run && -z $out ]] && out=$(mktemp -d)
done
status=0
for call in "${calls[@]}"; do
    # The user's --out comes later, and overrides this one.
    "$python" bench/gpu.py "$call" ${out:+--out "$out"} "$@" || status=$?
    ((status < 2)) || break
done
exit "$status"
