#!/usr/bin/env bash
# The whole GPU checklist in one call of at most 9 minutes, results in OUTDIR.
#
#     bench/gpu.sh OUTDIR
#
# Needs Python with torch (CUDA), Triton and jaxtyping; nothing of ours need be installed. pytest
# runs the kernel tests on the device; without it the benchmarks' own checks stand in. Peers are
# taken from .venv/peers (`make peers`) or the environment, and named where they are missing.
# A step that fails or runs out of its time is named in the summary and the next one runs.
set -u
out=${1:?usage: bench/gpu.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
python=${PYTHON:-python3}
summary="$out/summary.txt"
: >"$summary"
failed=0
END=530 # seconds after the start: where the last step is stopped

has() { "$python" -c "import $1" 2>/dev/null; }

# step NAME SECONDS COMMAND...: run it within its time, keep its log, say how it went
step() {
  local name=$1 limit=$2 begun=$SECONDS code
  shift 2
  [ "$limit" -le $((END - SECONDS)) ] || limit=$((END - SECONDS))
  if [ "$limit" -lt 5 ]; then
    echo "$name: NOT RUN, no time is left" >>"$summary"
    failed=1
    return
  fi
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) echo "$name: ok, $((SECONDS - begun)) s" ;;
    124) echo "$name: stopped after its $limit s" ;;
    *) echo "$name: FAILED with $code, see $name.log" ;;
  esac >>"$summary"
  [ "$code" -eq 0 ] || failed=1
}

for module in torch triton jaxtyping; do
  has "$module" || { echo "needs the Python module $module: $python -m pip install $module"; exit 2; }
done
"$python" - >"$out/machine.json" <<'PY' || { echo "needs a CUDA device that torch can see"; exit 2; }
import json, torch
assert torch.cuda.is_available()
from bench._machine import machine
print(json.dumps(machine("cuda")))
PY

# addopts name a typing hook and plugins that are not needed here
pytest=("$python" -m pytest -q -p no:cacheprovider -o "addopts=--import-mode=importlib")
if has pytest; then
  step bits 80 "${pytest[@]}" tests/kernels -k "cuda and (bits or bitwise or same_bits)"
  step device 150 "${pytest[@]}" tests/kernels -k cuda
else
  echo "pytest is missing: the device tests did not run, only the benchmarks' checks" >>"$summary"
  failed=1
fi
step check 40 "$python" -m bench.speed --check
step conformance 110 "$python" -m bench.conformance --out "$out/conformance.json"

# --- tune: tiles for this device, for a person to look at; nothing is written into the tree ---
[ -f bench/tune.py ] && step tune 60 "$python" -m bench.tune --quick --out "$out/tiles.json"

# rows are appended as each task ends, so that a run which is stopped leaves what it measured
if has pytest && has pytest_benchmark; then
  step speed 540 "${pytest[@]}" bench --benchmark-only \
    --benchmark-json="$out/benchmark.json" --seconds 0.5 --out "$out/speed.jsonl"
else
  step speed 540 "$python" -m bench.speed --seconds 0.5 --out "$out/speed.jsonl"
fi

cat "$out/conformance.log" 2>/dev/null
grep -hE "^(linear|token)_logprob|^ .* (ms|peer) |^  missing" "$out/speed.log"
tail -n 3 "$out"/{bits,device}.log 2>/dev/null
cat "$out/machine.json" "$summary"
[ -f "$out/speed.jsonl" ] && "$python" -m bench.speed --digest "$out/speed.jsonl"
exit "$failed"
