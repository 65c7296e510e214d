#!/bin/sh
# Measure everything that is published. Arguments go to `dsv4lab bench`, such as --commit ID outside a checkout.
set -eu
cd "$(dirname "$0")/../.."
peers=$(python3 -c '
import importlib.util as u
print(",".join(n for n in ("quack", "humming") if u.find_spec(n)))')
python3 -m dsv4lab bench --shapes deepseek-v4 --repeats 15 --csv data/benchmarks.csv ${peers:+--peers "$peers"} "$@"
python3 -m dsv4lab.bench.layer --csv data/layers.csv "$@"
