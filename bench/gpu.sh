#!/usr/bin/env bash
# Builds for this machine's GPU, runs the tests that need one, measures; the table is what is printed last.
#
#   bench/gpu.sh [--quick] [--only STAGE] [--dry-run] [--no-build] [--no-tests] [--out FOLDER]
#
# Under ten minutes in all: building, tests and measuring each have a limit. No network, nothing installed.
# Writes FOLDER/gpu-<device>.json (default bench/results, or RAPIDIN_BENCH_OUT). --dry-run goes the same way on
# a machine without a GPU, at sizes that show nothing but that it works, and writes to a temporary folder.
# PYTHON=... picks the interpreter; RAPIDIN_CUDA_ARCHS what is compiled for, by default this GPU alone.
# Ends with 1 where a test or a row failed, 2 where it could not begin.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${RAPIDIN_BENCH_OUT:-}
build=1 built=1 tests=1 dry=0
declare -a options=()
while (($#)); do
    case $1 in
        --quick) options+=(--quick) ;;
        --only) options+=(--only "${2:?--only takes a stage}") && shift ;;
        --dry-run) dry=1 options+=(--dry-run) ;;
        --no-build) build=0 ;;
        --no-tests) tests=0 ;;
        --out) out=${2:?--out takes a folder} && shift ;;
        *) echo "gpu.sh: unknown option '$1'; the head of the file lists them" >&2 && exit 2 ;;
    esac
    shift
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if ((dry)); then
    out=${out:-$(mktemp -d)}
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
else
    out=${out:-bench/results}
fi
status=0
begun=$(date +%s)
left() { echo "$((560 - ($(date +%s) - begun)))"; }  # seconds, with a little kept for the last row

# ---- build: this GPU's machine code alone, which is what makes it quick
if ((build)); then
    SECONDS=0
    if ((dry)); then
        export RAPIDIN_CUDA=off  # the emulated kernels are built by the measuring itself
        "$python" -c 'import rapidin._cpu' 2>/dev/null && echo "build: rapidin._cpu is there" && build=0
    else
        arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
            echo "gpu.sh: torch finds no GPU; --dry-run goes without one" >&2
            exit 2
        }
        export RAPIDIN_CUDA=on RAPIDIN_CUDA_ARCHS=${RAPIDIN_CUDA_ARCHS:-$arch}
        if [[ -z ${CUDACXX:-}${CUDA_HOME:-}${CUDA_PATH:-} ]] && ! command -v nvcc >/dev/null; then
            export CUDA_HOME=/usr/local/cuda
        fi
    fi
    export RAPIDIN_BUILD_JOBS=${RAPIDIN_BUILD_JOBS:-$(nproc)}
    # What is there may have been compiled for another GPU, which its date does not show.
    stamp="build/for-$RAPIDIN_CUDA-${RAPIDIN_CUDA_ARCHS:-}"
    declare -a how=(build_ext --inplace)
    [[ -e $stamp ]] || how+=(--force)
    log=$(mktemp)
    if ((build)) && ! timeout 200 "$python" setup.py "${how[@]}" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        # Without CUDA C++ there is still Triton to measure.
        echo "build: failed with RAPIDIN_CUDA=$RAPIDIN_CUDA; going on without rapidin._cuda" >&2
        status=1 built=0
        rm -f rapidin/_cuda*.so
        RAPIDIN_CUDA=off timeout 200 "$python" setup.py build_ext --inplace >"$log" 2>&1 || {
            tail -n 40 "$log" >&2
            exit 2
        }
    fi
    rm -f "$log"
    if ((build && built)); then
        rm -f build/for-*
        touch "$stamp"
    fi
    echo "build: $SECONDS s"
fi

# ---- tests: those of the GPU's kernels; a failure is told, and measuring goes on
if ((tests)); then
    SECONDS=0
    shopt -s nullglob
    files=(tests/test_gpu_*.py tests/test_device*.py)
    shopt -u nullglob
    declare -a keep=()  # tests/test_gpu_hash.py at least: pytest without files would run all there are
    for file in "${files[@]}"; do
        [[ $file == */test_gpu_bench.py ]] || keep+=("$file")  # which runs this script
    done
    declare -a how=(-q -p no:cacheprovider)
    if ((dry)); then
        how+=(--collect-only)
    elif "$python" -c "import xdist" 2>/dev/null; then
        how+=(-n 8)  # most of the time is Triton's, compiling for each shape
    fi
    log=$(mktemp)
    code=0
    timeout 120 "$python" -m pytest "${how[@]}" ${keep[@]+"${keep[@]}"} >"$log" 2>&1 || code=$?
    if ((code == 124)); then
        echo "tests: stopped after 120 s"
    fi
    tail -n "$((code ? 30 : 3))" "$log"
    rm -f "$log"
    ((code)) && status=1
    echo "tests: $SECONDS s, pytest ended with $code"
fi

# ---- measuring
name=$("$python" - "$dry" <<'NAME'
import re, sys
name = "dry run"
if sys.argv[1] != "1":
    import torch
    name = torch.cuda.get_device_name(0)
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
NAME
)
"$python" bench/gpu.py --out "$out/gpu-$name.json" --seconds "$(left)" ${options[@]+"${options[@]}"} || status=1
exit "$status"
