#!/usr/bin/env bash
# The whole GPU checklist in one call of at most 9 minutes, results in OUTDIR.
#
#     bench/gpu.sh OUTDIR
#
# Needs Python with torch (CUDA), Triton and jaxtyping; transformers for sharing; nothing of ours
# need be installed. pytest runs the kernel tests on the device; without it the benchmarks' own
# checks stand in. Peers are taken from .venv/peers (`make peers`) or the environment, and named
# where they are missing. A step that fails or runs out of its time is named in the summary and the
# next one runs. What is judged runs side by side, what is timed alone.
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
END=530 # seconds after the start: where the last step is stopped

has() { "$python" -c "import $1" 2>/dev/null; }

# step NAME SECONDS COMMAND...: run it within its time, keep its log, say how it went
step() {
  local name=$1 limit=$2 begun=$SECONDS code
  shift 2
  [ "$limit" -le $((END - SECONDS)) ] || limit=$((END - SECONDS))
  if [ "$limit" -lt 5 ]; then
    echo "$name: NOT RUN, no time is left" >>"$summary"
    return
  fi
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) echo "$name: ok, $((SECONDS - begun)) s" ;;
    124) echo "$name: STOPPED after its $limit s" ;;
    *) echo "$name: FAILED with $code, see $name.log" ;;
  esac >>"$summary"
}

for module in torch triton jaxtyping; do
  has "$module" || { echo "needs the Python module $module: $python -m pip install $module"; exit 2; }
done
"$python" - >"$out/machine.json" <<'PY' || { echo "needs a CUDA device that torch can see"; exit 2; }
import json, torch
assert torch.cuda.is_available()
from bench._measure import machine
print(json.dumps(machine("cuda")))
PY

# --- judged, side by side: none of it is timed, and compiling takes a core a process ---
# addopts name a typing hook and plugins that are not needed here
pytest=("$python" -m pytest -q -p no:cacheprovider -o "addopts=--import-mode=importlib")
bits="bits or bitwise or same_bits"
if has pytest; then
  # a worker holds some 600 MiB of the GPU
  has xdist && workers=(-n 4) || workers=()
  step bits 150 "${pytest[@]}" "${workers[@]}" tests/kernels -k "cuda and ($bits)" &
  # the last two choose the device themselves
  step device 150 "${pytest[@]}" "${workers[@]}" tests/kernels \
    -k "(cuda or any_tree or flex_is_as_accurate) and not ($bits)" &
else
  echo "pytest is MISSING: the device tests did not run, only the benchmarks' checks" >>"$summary"
fi
step check 120 "$python" -m bench.speed --check &
step check_tree 120 "$python" -m bench.tree_attention --check &
step check_sharing 120 "$python" -m bench.sharing_gpu --check &
if has accelerate && has peft; then
  step fsdp 120 "$python" -m torch.distributed.run --standalone --nproc_per_node 1 \
    tests/workers/training_shards_device.py &
else
  echo "fsdp: not both accelerate and peft here" >>"$summary"
fi
step conformance 150 "$python" -m bench.conformance --out "$out/conformance.json" &
wait

# --- tune: the best tiles of this device go into this checkout's tables, and are timed below ---
step tune_tree 45 "$python" -m bench.tune --op tree_attention --quick --out "$out/tiles.json"
step tune 30 "$python" -m bench.tune --op linear_logprob --quick --out "$out/tiles.json"

# --- timed: rows are appended as each task ends, so that a run which is stopped leaves them ---
step tree 60 "$python" -m bench.tree_attention --seconds 0.5 --out "$out/tree.jsonl"
step sharing 130 "$python" -m bench.sharing_gpu --seconds 0.5 --out "$out/sharing.jsonl"
# hosts, where they are: nothing of the checklist fails without them
if has trl.trainer.grpo_trainer; then
  step grpo 30 "$python" -m bench.trl_grpo --device cuda --dtype bfloat16 --shape 2048 256 16 \
    --seconds 0.5 --out "$out/hosts.jsonl"
else
  echo "grpo: no TRL here, or not all that it needs" >>"$summary"
fi
if has lm_eval.models.huggingface; then
  step lm_eval 30 "$python" -m bench.lm_eval_tasks --device cuda --seconds 0.5 \
    --out "$out/hosts.jsonl"
else
  echo "lm_eval: no lm-eval here" >>"$summary"
fi
if has fastapi && has uvicorn && has prometheus_client && has msgpack; then
  step server 45 "$python" -m bench.server --device cuda --dtype bfloat16 --shape 2048 256 16 \
    --prompts 16 --seconds 5 --out "$out/hosts.jsonl"
else
  echo "server: not all of FastAPI, uvicorn, prometheus_client and msgpack here" >>"$summary"
fi
if has pytest && has pytest_benchmark; then
  step speed 540 "${pytest[@]}" bench/test_speed.py --benchmark-only \
    --benchmark-json="$out/benchmark.json" --seconds 0.5 --out "$out/speed.jsonl"
else
  step speed 540 "$python" -m bench.speed --seconds 0.5 --out "$out/speed.jsonl"
fi

cat "$out/conformance.log" 2>/dev/null
tail -n 3 "$out"/{bits,device}.log 2>/dev/null
grep -h "of the way" "$out/fsdp.log" 2>/dev/null
grep -hE "^(linear|token)_logprob|^ .* (ms|peer) |^  missing" "$out/speed.log" 2>/dev/null
cat "$out/machine.json" "$summary"
[ -f "$out/speed.jsonl" ] && "$python" -m bench.speed --digest "$out/speed.jsonl"
# ours beside who it is compared with, and what was asked for
grep -hE "^tree_attention|^  (ours|FlexAttention|causal) |^  (goal|missing)" "$out/tree.log" 2>/dev/null
grep -hE "^server|tokens/s" "$out/server.log" 2>/dev/null
grep -hE "^sharing|^  (ours|padded|DynamicCache|generate)|^  (goal|missing)" "$out/sharing.log" 2>/dev/null
# few files: what brings them back may take no more
cp kernels/sharpen_kernels/_tiles.py "$out"
(cd "$out" && ls -- *.log *.py benchmark.json 2>/dev/null | tar czf logs.tar.gz -T - --remove-files)
! grep -qE "FAILED|STOPPED|NOT RUN|MISSING" "$summary"
