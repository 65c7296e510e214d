#!/bin/sh
# compute-sanitizer's memcheck and racecheck over kernels, which are compiled before so that only they are slow.
# Argument: how many random products (default 40).
set -eu
cd "$(dirname "$0")/../.."
count=${1:-40}
run() {
    "$@" python3 -m dsv4lab.bench.random_products --count "$count"
    "$@" python3 -m pytest -c /dev/null --rootdir . --confcutdir tests --import-mode importlib -q \
        tests/kernels/test_quantize_gpu.py -k "graph or (large_rows and 17)"
}
run env
for tool in memcheck racecheck; do
    run compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 0
done
