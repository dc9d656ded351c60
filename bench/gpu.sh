#!/usr/bin/env bash
# Builds for this machine's GPU, checks, measures: in two calls, as a machine is lent for minutes.
#
#   bench/gpu.sh smoke   [--out FOLDER] [--seconds 150] [--dry-run] [--no-build] [--no-tests]
#   bench/gpu.sh measure [--out FOLDER] [--seconds 420] [--dry-run] [--no-build] [--quick] [--only STAGE]
#   bench/gpu.sh [--out FOLDER] [--dry-run]      both, one after the other
#   --commit HASH with either: of this checkout, where git does not know it
#
# smoke: the build, each kernel against the reference, a tiny cache and query beside the CPU's, compute-sanitizer,
# the tests. measure: caching first, then each kernel against what the GPU can do; it builds what is not there.
# No network, nothing installed. FOLDER (bench/results, or RAPIDIN_BENCH_OUT) gets smoke-<device>.jsonl, a line a
# row, gpu-<device>.json and logs, all of them as they come: what is cut short leaves what it had. --dry-run goes
# the same way on a machine without a GPU, at sizes that show nothing but that it works, by default into a
# temporary folder. PYTHON=... picks the interpreter; RAPIDIN_CUDA_ARCHS what is compiled for, by default this
# GPU alone. Ends with 1 where something failed, 2 where it could not begin.
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
    # A second --out, of the user's, counts.
    "$python" bench/gpu.py "$call" ${out:+--out "$out"} "$@" || status=$?
    ((status < 2)) || break
done
exit "$status"
