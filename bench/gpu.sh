#!/usr/bin/env bash
# The whole GPU checklist in one call of at most 9 minutes, results in OUTDIR.
#
#     bench/gpu.sh OUTDIR
#
# Needs Python with torch (CUDA), Triton and jaxtyping; nothing of ours need be installed.
# pytest runs the kernel tests on the device; without it the benchmark's own check stands in.
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

has() { "$python" -c "import $1" 2>/dev/null; }

# step NAME SECONDS COMMAND...: run it within its time, keep its log, say how it went
step() {
  local name=$1 limit=$2 begun=$SECONDS code
  shift 2
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

# addopts name a typing hook that is not needed here
pytest=("$python" -m pytest -q -p no:cacheprovider -o "addopts=--import-mode=importlib")
if has pytest; then
  step bits 120 "${pytest[@]}" tests/kernels/test_linear_logprob_bits.py -k cuda
  step accuracy 150 "${pytest[@]}" tests/kernels/test_linear_logprob.py -k cuda
  step edges 120 "${pytest[@]}" tests/kernels/test_linear_logprob_edges.py -k cuda
  step contract 60 "${pytest[@]}" tests/kernels/test_linear_logprob_contract.py -k cuda
  step logits 120 "${pytest[@]}" tests/kernels/test_token_logprob*.py -k cuda
  step segments 60 "${pytest[@]}" tests/kernels/test_segment_reduce*.py -k cuda
else
  echo "pytest is missing: the device tests did not run, only bench --check" >>"$summary"
  failed=1
fi
step check 60 "$python" -m bench.linear_logprob --check
step check_logits 60 "$python" -m bench.token_logprob --check
step bench_logits 120 timeout 110 \
  "$python" -m bench.token_logprob --seconds 1 --out "$out/token_logprob.jsonl"
step bench 540 timeout $((530 - SECONDS > 30 ? 530 - SECONDS : 30)) \
  "$python" -m bench.linear_logprob --seconds 2 --out "$out/linear_logprob.jsonl"

tail -n 3 "$out"/{bits,accuracy,edges,contract,logits,segments}.log 2>/dev/null
grep -h " ms" "$out/bench_logits.log" "$out/bench.log"
cat "$out/machine.json" "$summary"
exit "$failed"
