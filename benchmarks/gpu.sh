#!/usr/bin/env bash
# What klplug can show on one GPU, in under ten minutes, with torch and transformers alone:
#   1. the core's tests that need CUDA or bf16       3. GRPO of a small model, k2 and stock k3
#   2. the KL term beside the hosts' own functions   4. how good each gradient is on that model
#   5. the exact KL beside two matrices of logits
#
#   MODEL=DIR HOSTS=DIR benchmarks/gpu.sh        SMALL=1 benchmarks/gpu.sh: a rehearsal, on a CPU
#
# MODEL: a folder of SmolLM2-135M-Instruct (python -m recipes.quickstart.smollm2 --cache DIR makes one).
#        Without it the quickstart's own policy serves, which shows that things run and little more.
# HOSTS: a folder with wheels of verl and OpenRLHF; without it pip fetches them (--no-deps).
# OUT: where results go (benchmarks/results/gpu). PYTHON: which Python (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 KLPLUG_TEST_HOSTS=
PYTHON=${PYTHON:-python3} OUT=${OUT:-benchmarks/results/gpu} SMALL=${SMALL:-}
MODEL=${MODEL:-recipes/quickstart/policy}
mkdir -p "$OUT"

device=$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 1
if [ "$device" = cpu ] && [ -z "$SMALL" ]; then
  echo "no CUDA device is seen; SMALL=1 rehearses on a CPU" >&2
  exit 1
fi
"$PYTHON" - > "$OUT/machine.txt" <<'END'
import platform, torch, transformers
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU " + platform.processor()
print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}")
END
cat "$OUT/machine.txt"

failed=
part() { # NAME LIMIT COMMAND...: under a limit of seconds, its output kept; the next part runs anyway
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: status $status, $((SECONDS - began)) s"
  [ "$status" -eq 0 ] || failed="$failed $name"
}

if [ -z "${HOSTS:-}" ]; then
  HOSTS=$(mktemp -d)
  "$PYTHON" -m pip download -q --no-deps --no-binary openrlhf -d "$HOSTS" verl==0.9.1 openrlhf==0.11.2 ||
    "$PYTHON" -m pip download -q --no-deps -d "$HOSTS" verl==0.9.1 openrlhf==0.11.2
fi

part tests "${TESTS_LIMIT:-100}" "$PYTHON" -m pytest -q --import-mode=importlib -p no:cacheprovider \
  tests/core/test_devices.py tests/core/test_term.py -k 'devices or cuda or bf16 or bfloat16'
part kl-term "${KL_TERM_LIMIT:-60}" "$PYTHON" -m benchmarks.gpu_kl_term --hosts "$HOSTS" \
  --out "$OUT/kl_term.md" ${SMALL:+--small}
if [ -n "$SMALL" ]; then
  set -- --steps 2 --supervised-steps 2 --prompts 2 --group 4 --every 1
else
  set -- --steps 70 # about a second each, and there are two runs
fi
part exact "${EXACT_LIMIT:-140}" env SMALL="$SMALL" "$PYTHON" -m pytest -q -s --import-mode=importlib \
  -p no:cacheprovider benchmarks/test_exact.py
part grpo "${GRPO_LIMIT:-220}" "$PYTHON" -m benchmarks.gpu_grpo --model "$MODEL" --device "$device" \
  --out "$OUT/grpo.jsonl" "$@"
if [ -n "$SMALL" ]; then set -- --answers 32 --prompts 2; else set -- --answers 2048 --prompts 32; fi
part gradients "${GRADIENTS_LIMIT:-100}" "$PYTHON" -m recipes.reproduce.gradient_study --model "$MODEL" \
  --device "$device" --out "$OUT/gradient_study.jsonl" "$@"
part figure 30 "$PYTHON" -c "
import sys
from pathlib import Path
from recipes.reproduce.figures import gradient_figure
from recipes.reproduce.study_pages import gradient_lines
gradient_figure(gradient_lines(Path(sys.argv[1])), Path(sys.argv[2]))
" "$OUT/gradient_study.jsonl" "$OUT/gradient-study.svg"

echo "in all $SECONDS s; results in $OUT${failed:+; failed:$failed}"
[ -z "$failed" ]
