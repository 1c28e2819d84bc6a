#!/usr/bin/env bash
# Everything worth measuring on a bare GPU machine without network, step by step; a step that is cut leaves what the ones before it stored.
#
#   bench/gpu.sh [--dry-run]
#
# The machine brings PyTorch, Triton, transformers and nvcc. Variables:
#   PYTHON=python3        the interpreter that has them
#   WHEELS=DIR            wheels of what is missing (diffusers, pybind11, tensorrt-rtx, ...); nothing is fetched from anywhere else
#   VENV=DIR              environment that is made, if it is not there, on top of the machine's packages, which stay as they are (default: .venv-gpu)
#   OUT=DIR               logs and result files (default: bench/results); steps.txt holds how each step ended
#   STEPS_OF_SCRIPT="build test verify tune profile bench"    which steps to run; train, which makes the demo model anew, only where it is named
#   MINUTES=9             of one call of the bench; it is called again until nothing is left, at most ROUNDS=4 times
#   TUNE_MINUTES=6        for block sizes and forms; what is left is left for the next run
#   DEVICE=cuda MODEL=random-sd14 STEPS=0 SECONDS_EACH=20 QUICK=0    passed on to the bench; DEVICE=cpu MODEL=tiny STEPS=2 QUICK=1 tries the script out
#   PARTS=LIST            only these parts of the bench
#   NAME=FILE             name of the result file inside OUT (default: made of date and commit); a file that is there is gone on with
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
VENV=${VENV:-.venv-gpu}
MINUTES=${MINUTES:-9}
TUNE_MINUTES=${TUNE_MINUTES:-6}
ROUNDS=${ROUNDS:-4}
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-random-sd14}
STEPS=${STEPS:-0}
SECONDS_EACH=${SECONDS_EACH:-20}
QUICK=${QUICK:-0}
PARTS=${PARTS:-}
STEPS_OF_SCRIPT=${STEPS_OF_SCRIPT:-build test verify tune profile bench}
IS_DRY=0
case "${1:-}" in
  --dry-run) IS_DRY=1 ;;
  "") ;;
  *)
    echo "bench/gpu.sh: $1 is no flag of it, there is --dry-run" >&2
    exit 2
    ;;
esac
for step in $STEPS_OF_SCRIPT; do
  case "$step" in
    build | test | verify | tune | profile | bench | train) ;;
    *)
      echo "bench/gpu.sh: STEPS_OF_SCRIPT names $step, there are build, test, verify, tune, profile, bench and train" >&2
      exit 2
      ;;
  esac
done
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1
FAILED=""
CHILD=""

# A signal ends the step at work and then the script; what was stored stays.
cut() {
  [ -n "$CHILD" ] && kill -TERM "$CHILD" 2>/dev/null && wait "$CHILD"
  echo "cut; the logs and result files so far are in $OUT, the same line again goes on" >&2
  exit 143
}
trap cut INT TERM HUP

# run NAME SECONDS COMMAND...: the command with a limit of time and a log of its own; what it says is shown as it comes.
run() {
  local name=$1 limit=$2 code begin=$SECONDS
  shift 2
  echo "== $name (at most $limit s): $*"
  [ "$IS_DRY" = 1 ] && return 0
  timeout --kill-after=15 "$limit" "$@" > >(tee "$OUT/$name.log") 2>&1 &
  CHILD=$!
  wait "$CHILD"
  code=$?
  CHILD=""
  echo "$name ended with $code after $((SECONDS - begin)) s" | tee -a "$OUT/steps.txt"
  [ "$code" = 0 ] || FAILED="$FAILED $name($code)"
  return "$code"
}

wanted() { case " $STEPS_OF_SCRIPT " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

if [ "$IS_DRY" = 0 ]; then
  mkdir -p "$OUT" && : >>"$OUT/steps.txt" || {
    echo "bench/gpu.sh: OUT=$OUT cannot be written to, choose another folder" >&2
    exit 3
  }
fi

if wanted build; then
  [ -x "$VENV/bin/python" ] || run venv 120 "$PYTHON" -m venv --system-site-packages --without-pip "$VENV"
  install=("$PYTHON" -m pip --python "$VENV/bin/python" --disable-pip-version-check install --quiet --no-index --no-deps)
  [ -n "${WHEELS:-}" ] && run wheels 300 "${install[@]}" "$WHEELS"/*.whl
  run build 900 "${install[@]}" --no-build-isolation --editable .
fi
[ -x "$VENV/bin/python" ] || [ "$IS_DRY" = 1 ] && PYTHON="$VENV/bin/python"
if wanted build; then
  run versions 120 "$PYTHON" -c "from bench.machine.machine import installed; from datasetdm_fast import _C; print(installed(), 'CUDA in the extension:', _C.built_with_cuda)"
fi

if wanted test; then
  run test 900 "$PYTHON" -m pytest -m gpu -q
fi

if wanted verify; then
  verify=("$PYTHON" -m datasetdm_fast.verify --engine fast --against torch --device "$DEVICE" --quiet)
  for dtype in fp32 fp16 bf16; do
    [ "$DEVICE" = cpu ] && [ "$dtype" = fp16 ] && continue
    run "verify-demo-$dtype" 400 "${verify[@]}" --dtype "$dtype" --number 4 --steps "$STEPS"
    run "verify-full-$dtype" 400 "${verify[@]}" --dtype "$dtype" --model "$MODEL" --decoder none --number 2 --batch-size 2 --steps 2
  done
fi

if wanted tune && [ "$DEVICE" != cpu ]; then
  run tune $((60 * TUNE_MINUTES + 240)) "$PYTHON" -m bench kernels --tune --dtypes fp16,bf16 --minutes "$TUNE_MINUTES" --out "$OUT/tuned-${NAME:-$(date -u +%Y-%m-%d).json}"
fi

file="$OUT/${NAME:-$(date -u +%Y-%m-%d)-gpu-$(git rev-parse --short=7 HEAD 2>/dev/null || echo unknown).json}"
flags=(--device "$DEVICE" --model "$MODEL" --steps "$STEPS" --seconds "$SECONDS_EACH" --minutes "$MINUTES" --out "$file")
[ "$QUICK" = 1 ] && flags+=(--quick)
limit=$((60 * ${MINUTES%.*} + 420))

if wanted profile; then
  run profile "$limit" "$PYTHON" -m bench gpu "${flags[@]}" --parts profile
fi

if wanted bench; then
  left=(--out "$file" --left)
  [ -n "$PARTS" ] && flags+=(--parts "$PARTS") && left+=(--parts "$PARTS")
  for round in $(seq "$ROUNDS"); do
    run "bench-$round" "$limit" "$PYTHON" -m bench gpu "${flags[@]}"
    [ $? = 2 ] && break # a wrong variable does not become right
    [ "$IS_DRY" = 1 ] && break
    [ -z "$("$PYTHON" -m bench gpu "${left[@]}")" ] && break
  done
fi

if wanted train; then
  run train 3000 "$PYTHON" -m datasetdm_fast.demo.train --out "$OUT/demo-model" --device "$DEVICE"
fi

if [ -n "$FAILED" ]; then
  echo "failed:$FAILED; the logs are in $OUT" >&2
  exit 4
fi
echo "done; the logs and result files are in $OUT"
