#!/usr/bin/env bash
# The first half hour on a GPU, in calls of at most nine minutes each, for machines whose commands end after ten:
#
#   bench/gpu.sh 0 [--dry-run]    what decides the claim: the race, a whole run of generate, agreement, the longest kernels
#   bench/gpu.sh 1 [--dry-run]    build, GPU tests, agreement with the reference, the same run twice, and which form of each operation is fastest
#   bench/gpu.sh 2 [--dry-run]    datasetdm_fast against diffusers and DatasetDM as written; stages, layers, profile
#   bench/gpu.sh 3 [--dry-run]    block sizes of the kernels that run, memory checker, hardware counters
#
# Every step is cut where its call ends; what was stored stays, and the same line again resumes. --dry-run prints the steps and writes nothing.
# The machine brings PyTorch for CUDA, Triton and nvcc; neither is ever exchanged. Variables:
#   PYTHON=python3            the interpreter that has them, also one of a virtual environment
#   VENV=.venv-gpu            environment that is made on top of it
#   WHEELS=DIR                wheels of libraries that are missing (diffusers, transformers, pycocotools, ...); without it pip asks its index
#   CACHE=DIR                 Triton kernels compiled elsewhere with `python -m bench rehearse --compile --cache DIR`
#   OUT=bench/results         where the log of each call and the result files go, at most six after each call
#   ONLY="probe tune"         only these of: environment build tests verify twice race probe bench tune memcheck counters
#   SECONDS_ALL=540           of one call
#   COMMIT=abc1234            what the files name as measured, for a copy without history
#   NAME=DATE-gpu-COMMIT      how the result files begin
#   PEERS=LIST                peers of the race in call 0, such as diffusers,ours,diffusers-compiled
#   PARTS=LIST                parts of `python -m bench gpu` in call 2
#   DEVICE=cuda MODEL=random-sd14    DEVICE=cpu MODEL=tiny tries the script out
# Exit codes: 0 done, 2 wrong usage, 3 something is missing, 4 a step failed or was left, 143 interrupted.
set -uo pipefail
cd "$(dirname "$0")/.."

CALL=""
IS_DRY=0
KINDS="environment build tests verify twice race probe bench tune memcheck counters"
refuse() { # CODE SENTENCE
  echo "bench/gpu.sh: $2" >&2
  exit "$1"
}
for word in "$@"; do
  case "$word" in
    0 | 1 | 2 | 3) CALL=$word ;;
    --dry-run) IS_DRY=1 ;;
    *) refuse 2 "'$word' is neither a call (0, 1, 2 or 3) nor --dry-run" ;;
  esac
done
[ -n "$CALL" ] || refuse 2 "which call? 0, 1, 2 or 3; the head of this file says what each does"
for word in ${ONLY:-}; do
  case " $KINDS " in *" $word "*) ;; *) refuse 2 "ONLY names $word, there are $KINDS" ;; esac
done

PYTHON=$(command -v "${PYTHON:-python3}") || refuse 3 "PYTHON=$PYTHON is no interpreter"
VENV=${VENV:-.venv-gpu} OUT=${OUT:-bench/results} DEVICE=${DEVICE:-cuda} MODEL=${MODEL:-random-sd14}
SECONDS_ALL=${SECONDS_ALL:-540} PARTS=${PARTS:-"limits,peers diffusers,peers upstream-tf32,stages,layers,profile,chunks"}
NAME=${NAME:-$(date -u +%Y-%m-%d)-gpu-${COMMIT:-$(git rev-parse --short=7 HEAD 2>/dev/null || echo unknown)}}
LOG=$OUT/$NAME-log-$CALL.txt
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1

# Before anything is written: the machine has what only it can bring.
if [ "$IS_DRY" = 0 ]; then
  torch=$("$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.is_available())' 2>/dev/null) ||
    refuse 3 "$PYTHON cannot import torch; name with PYTHON the interpreter that can"
  [ "$DEVICE" = cpu ] || [ "${torch##* }" = True ] ||
    refuse 3 "torch ${torch% *} of $PYTHON sees no GPU; DEVICE=cpu MODEL=tiny tries the script on a CPU, --dry-run shows its steps"
  mkdir -p "$OUT" && : >>"$LOG" || refuse 3 "OUT=$OUT cannot be written to, choose another folder"
  exec 8<"$OUT" # what a call leaves at work if it is killed, it keeps from the next one
  flock --nonblock 8 || refuse 3 "another call is at work in OUT=$OUT; wait until it has ended"
  WORK=$(mktemp -d)
  mkdir "$WORK/running"
fi

# Before a command that uses the GPU beside a race, which has it alone from its first timed turn: such a command then
# ends at once with BUSY.
SHARED=() BUSY=75

# A command ends with the script, also where that is killed.
MORTAL=()
command -v setpriv >/dev/null && MORTAL=(setpriv --pdeathsig TERM)

wanted() { case " ${ONLY:-$KINDS} " in *" ${1%%-*} "*) return 0 ;; *) return 1 ;; esac; }
left() { echo $((SECONDS_ALL - SECONDS)); }
minutes_left() { awk "BEGIN { m = ($(left) - $1) / 60; print m < 0 ? 0 : m }"; } # less so many seconds

# step NAME SECONDS COMMAND...: never past the end of the call; its last lines are shown, all of them are in the log.
step() {
  local name=$1 limit=$2 begin=$SECONDS code=9
  shift 2
  wanted "$name" || return 0
  [ -e "/proc/$$" ] || exit 143 # beside a script that was killed
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$IS_DRY" = 1 ]; then
    echo "== $name (at most $limit s): $*"
    return 0
  fi
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time is left"
    echo "$name(no time)" >>"$WORK/failed"
    return 9
  fi
  "${MORTAL[@]}" timeout --kill-after=5 "$limit" "${SHARED[@]}" "$@" >"$WORK/running/$name" 2>&1 &
  wait $!
  code=$?
  echo "== $name ended with $code after $((SECONDS - begin)) s, $(left) s left" | tee -a "$WORK/running/$name"
  tail -n "${SHOWN:-6}" "$WORK/running/$name" | head -n -1 | cut -c1-300
  kept "$name" "$*"
  if [ "$code" = "$BUSY" ] && [ "${#SHARED[@]}" != 0 ]; then
    echo "$name" >>"$WORK/later"
  elif [ "$code" != 0 ]; then
    echo "$name($code)" >>"$WORK/failed"
  fi
  return "$code"
}

# What a step said goes into the log, in one piece even where steps run side by side.
kept() { # NAME COMMAND
  {
    flock 9
    { echo "==== $1: $2"; cat "$WORK/running/$1"; } >>"$LOG"
    rm -f "$WORK/running/$1"
  } 9>"$WORK/lock"
}

# Steps that need no timing share the GPU; a signal reaches each of them.
beside() { # FUNCTION WORDS...
  (
    trap 'kill -TERM $(jobs -p) 2>/dev/null; wait; exit 143' TERM
    trap - EXIT
    "$@"
  ) &
}
interrupted() {
  trap - INT TERM HUP
  kill -TERM $(jobs -p) 2>/dev/null
  wait
  echo "interrupted; the logs and result files so far are in $OUT, the same line again resumes" >&2
  exit 143
}
ended() {
  for one in "$WORK"/running/*; do
    [ -e "$one" ] && kept "${one##*/}" "did not end"
  done
  rm -rf "$WORK"
}
if [ "$IS_DRY" = 0 ]; then
  trap interrupted INT TERM HUP
  trap ended EXIT
fi

needs() { # STEP SECONDS SENTENCE COMMAND...: a step that all that follows needs
  step "$1" "$2" "${@:4}" && return
  case $? in 9 | 124 | 137) refuse 4 "left: $1 and all that follows, as its time was over; the same line again resumes" ;; esac
  refuse 3 "$3, $LOG says why"
}
needs environment 150 "the environment $VENV is not complete" "$PYTHON" -m bench.environment libraries "$VENV" ${WHEELS:+"$WHEELS"}
needs build 240 "the extension was not built" "$PYTHON" -m bench.environment build "$VENV"
[ -x "$VENV/bin/python" ] || [ "$IS_DRY" = 1 ] && PYTHON=$VENV/bin/python
if [ "$IS_DRY" = 0 ]; then
  if [ -n "${CACHE:-}" ] && "$PYTHON" -m bench rehearse --adopt "$CACHE"; then
    TRITON_CACHE_DIR=$(cd "$CACHE" && pwd)
    export TRITON_CACHE_DIR
  fi
  # A machine that checks memory or counts has its tools beside nvcc.
  export PATH=$PATH:/usr/local/cuda/bin
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu --format=csv 2>/dev/null | tee -a "$LOG"
fi

FEW=()
[ "$DEVICE" = cpu ] && FEW=(--steps 2) # a CPU tries the script out
verify() { # NAME FLAGS...
  step "verify-$1" 240 "$PYTHON" -m datasetdm_fast.verify --engine fast --against torch --device "$DEVICE" --quiet "${FEW[@]}" "${@:2}"
}
precisions() { if [ "$DEVICE" = cpu ]; then echo "${@:2}"; else echo "$1" "${@:2}"; fi; } # a CPU has no fp16

# Compiling kernels takes the cores, not the GPU, whose memory sets the limit.
CORES=$(nproc)
WORKERS=$((CORES < 4 ? 2 : CORES > 16 ? 8 : CORES / 2))
gpu_tests() {
  local files=() workers=()
  # Of the other files some need libraries that a GPU machine lacks, and none has a test for it.
  mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$WORKERS")
  step tests 300 "$PYTHON" -m pytest -m gpu -q "${workers[@]}" -p no:cacheprovider "${files[@]}"
}
demo_agrees() { verify "demo-$1" --dtype "$1" --number 4; }
same_twice() {
  local folder=${WORK:-/tmp} line=("$PYTHON" -m datasetdm_fast.generate --number 48 --batch-size 16 --device "$DEVICE" --quiet "${FEW[@]}")
  [ "$DEVICE" = cpu ] && line+=(--force-domain) # of so few steps
  for run in one two; do step "twice-$run" 120 "${line[@]}" --out "$folder/$run" || return; done
  # Indexes and samples; the state holds times, and the description of a run its folder.
  step twice 30 diff -rq "$folder/one" "$folder/two" --exclude=state --exclude=run.json --exclude='*.html' --exclude=README.md
}

full_agrees() { for dtype in $(precisions fp16 bf16); do agrees "$dtype"; done; }
agrees() { verify "full-$1" --dtype "$1" --model "$MODEL" --number 8 --batch-size 8 --steps 3; }
beside_the_race() {
  SHARED=(flock --no-fork --shared --nonblock --conflict-exit-code "$BUSY" "${WORK:-}/race")
  for dtype in $(precisions fp16); do agrees "$dtype"; done
  same_twice
  agrees bf16
}
is_later() { [ -e "${WORK:-/}/later" ] && grep -q "^$1" "$WORK/later"; }

case $CALL in
  0)
    if [ "$IS_DRY" = 1 ]; then
      beside_the_race
    else
      SAMPLED=timestamp,clocks.sm,power.draw,memory.used,temperature.gpu,clocks_event_reasons.active
      if command -v nvidia-smi >/dev/null; then
        "${MORTAL[@]}" nvidia-smi --query-gpu="$SAMPLED" --format=csv -lms 500 >"$OUT/$NAME-gpu.csv" 2>/dev/null 8<&- &
        SAMPLER=$!
      fi
      beside beside_the_race
      BESIDE=$!
    fi
    SHARED=()
    flags=(--device "$DEVICE" --model "$MODEL" --out "$OUT/$NAME.json" --parts "peers,limits,peers run")
    [ "$IS_DRY" = 1 ] || flags+=(--lock "$WORK/race")
    [ -z "${PEERS:-}" ] || flags+=(--raced "$PEERS")
    [ "$DEVICE" = cpu ] && flags+=(--quick --steps 2)
    for round in 1 2; do # a process that ended before its time is started again
      [ "$(left)" -gt 60 ] || [ "$round" = 1 ] || break
      SHOWN=80 step "race-$round" "$(left)" "$PYTHON" -m bench gpu "${flags[@]}" --minutes "$(minutes_left 15)"
      [ $? -gt 4 ] && [ "$IS_DRY" = 0 ] && wanted race || break
    done
    [ "$IS_DRY" = 1 ] || wait "$BESIDE"
    SHOWN=90 step probe "$(left)" "$PYTHON" -m bench probe --device "$DEVICE" --model "$MODEL" --parts longest_32,batches \
      --minutes "$(minutes_left 30)" --out "$OUT/$NAME-probe.json"
    is_later verify-full-fp16 && agrees fp16
    is_later twice && same_twice
    is_later verify-full-bf16 && agrees bf16
    [ -z "${SAMPLER:-}" ] || kill "$SAMPLER" 2>/dev/null
    ;;
  1)
    [ "$IS_DRY" = 1 ] && beside() { "$@"; } # its steps are printed one after the other
    beside gpu_tests
    for dtype in $(precisions fp16 bf16 fp32); do beside demo_agrees "$dtype"; done
    beside full_agrees
    beside same_twice
    wait
    minutes=$(minutes_left 20)
    SHOWN=200 step probe "$(left)" "$PYTHON" -m bench probe --device "$DEVICE" --model "$MODEL" --minutes "$minutes" --out "$OUT/$NAME-probe.json"
    ;;
  2)
    file=(--out "$OUT/$NAME.json" --parts "$PARTS")
    flags=(--device "$DEVICE" --model "$MODEL" "${file[@]}")
    if [ "$DEVICE" = cpu ]; then flags+=(--quick --steps 2 --seconds 0.1); else flags+=(--seconds 10); fi
    for round in 1 2 3; do # a part that takes the process with it is tried twice
      [ "$(left)" -gt 60 ] || break
      minutes=$(minutes_left 45)
      SHOWN=60 step "bench-$round" "$(left)" "$PYTHON" -m bench gpu "${flags[@]}" --minutes "$minutes"
      [ $? != 2 ] && [ "$IS_DRY" = 0 ] && wanted bench || break
      [ -n "$("$PYTHON" -m bench gpu --left "${file[@]}")" ] || break
    done
    ;;
  3)
    if [ "$DEVICE" != cpu ]; then
      SHOWN=60 step tune 360 "$PYTHON" -m bench kernels --tune --minutes 5 --out "$OUT/$NAME-tuned.json"
      # Every tensor in memory of its own: within the blocks that PyTorch keeps, a wrong address meets another tensor.
      step memcheck 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider tests/test_guided_step.py tests/test_kernels.py -k "(smallest or odd or guided) and not bfloat16"
      # Device counters need a right that some machines keep to themselves; then this step fails and says so.
      SHOWN=60 step counters 90 ncu --clock-control none --launch-count 16 -k "regex:group_norm|layer_norm|geglu|attention|upsample|fprop|xmma" \
        --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active,gpu__time_duration.sum \
        "$PYTHON" -m bench probe --device "$DEVICE" --model "$MODEL" --parts once
    fi
    ;;
esac

if [ "$IS_DRY" = 0 ]; then
  if [ -s "$WORK/failed" ]; then
    refuse 4 "failed: $(tr '\n' ' ' <"$WORK/failed")(exit codes in brackets); $LOG has what they said"
  fi
  echo "done; $LOG and the result files beside it are what there is to read"
fi
