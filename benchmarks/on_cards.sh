#!/usr/bin/env bash
# Measures, part by part, what docs/measured gives for one or two cards, with random weights:
#
#   bash benchmarks/on_cards.sh models                    # once: random models of the real shapes
#   bash benchmarks/on_cards.sh steps --measure topk16    # one card: h200_one_start.json
#
#   one card    models, steps, cold, learners, profile, decode, trl, teachers, topk, memory, contract ENGINE, together
#   two cards   cluster (--arms one; --arms each,roles), full_tuning
#   either      queue SECONDS:PART... (one after another; one that fails or takes longer does not end it)
#
# What follows a part's name goes to its program and comes after the arguments here.
#
# GPU_PYTHON runs the project. VLLM_PYTHON, SGLANG_PYTHON, UNSLOTH_PYTHON are the engines' interpreters
# (empty: `qwen3-distill engines install` made them), and VLLM_PYTHONPATH, ... folders for their PYTHONPATH.
# TRL_PYTHONPATH is for TRL and vLLM in GPU_PYTHON's process. SGLANG_SETTINGS are further overrides.
# OUT is the folder of the results.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${GPU_PYTHON:-.venv/bin/python} out=${OUT:-benchmarks/results}
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}src:." PYTHONUNBUFFERED=1
mkdir -p "$out"

# Overrides of a config: engine SECTION PYTHON PYTHONPATH [MORE ENVIRONMENT]
engine() {
  [ -z "$2" ] || echo "$1.python=$2"
  local variables="${3:+PYTHONPATH: $3}${4:+${3:+, }$4}"
  [ -z "$variables" ] || echo "$1.environment={$variables}"
}
mapfile -t engines < <(
  engine generation "${VLLM_PYTHON:-}" "${VLLM_PYTHONPATH:-}" 'VLLM_USE_FLASHINFER_SAMPLER: "0"'
  engine scoring "${SGLANG_PYTHON:-}" "${SGLANG_PYTHONPATH:-}" 'SGLANG_ENABLE_JIT_DEEPGEMM: "0"'
  engine training "${UNSLOTH_PYTHON:-}" "${UNSLOTH_PYTHONPATH:-}"
)
# Random weights: in FP8 their logprobs move far.
given=(student.model=models/random-4B scoring.model=models/random-8B scoring.readiness_tolerance_nats=3.0
  "${engines[@]}" ${SGLANG_SETTINGS:-})
# Room for long tails: prompts of 128 tokens, answers cut at 2,048.
lengths=(generation.max_model_tokens=2304 training.max_model_tokens=2304)
measure() { "$python" -m "benchmarks.$1" "${@:2}" --results "$out"; }

part=${1:?"a part: see the head of this file"} self=$PWD/benchmarks/on_cards.sh
shift
case $part in
  models) # 4B and 8B, or the shapes that are named, 32B-FP8 among them
    [ $# -gt 0 ] || set -- 4B 8B
    for shape; do
      [ -d "models/random-$shape" ] ||
        "$python" scripts/make_shape_model.py --shape "${shape%-FP8}" "models/random-$shape" --device cuda \
          $([ "$shape" = "${shape%-FP8}" ] || echo --fp8)
    done
    ;;
  steps) # sequential, streaming, long tails, other sizes, top 16, four answers to a prompt
    measure speed.one_start --config configs/h200-streaming.yaml --name h200_one_start \
      'objective={kind: sampled_reverse_kl}' "${given[@]}" "${lengths[@]}" \
      "output_dir=runs/steps-$(date +%Y%m%dT%H%M%S)" "$@" # a second run would find the first one's files
    ;;
  cold) # the shipped config with empty caches, and once more
    HOME=$(mktemp -d) && export HOME TORCHINDUCTOR_CACHE_DIR="$HOME/inductor" TRITON_CACHE_DIR="$HOME/triton"
    for figure in cold_start_s warm_start_s; do
      measure speed.start --config configs/h200.yaml --figure "$figure" --name h200_start "${given[@]}" "$@"
    done
    ;;
  learners) # prompts once, packing, FP8 below
    measure speed.learners --config configs/h200.yaml --name h200_rows "${given[@]}" "${lengths[@]}" \
      --learners unsloth,unsloth_shared,unsloth_packed@128xlongtail8:1,unsloth_fp8_backward@128x512:4 \
      --works 128x512:4,300x508:4,128xlongtail8:1 "$@"
    ;;
  profile) # the GPU's time in a step of an unsloth learner, kernel by kernel
    PYTHONPATH="${UNSLOTH_PYTHONPATH:+$UNSLOTH_PYTHONPATH:}$PYTHONPATH" \
      "${UNSLOTH_PYTHON:-$("$python" src/qwen3_distill/environments/make.py unsloth-cuda)}" \
      -m benchmarks.speed.learner_profile --config configs/h200.yaml --results "$out" "${given[@]}" "$@"
    ;;
  decode) # the GPU's time in a decode step of vLLM, kernel by kernel; --engine NAME=VALUE sets it otherwise
    PYTHONPATH="${VLLM_PYTHONPATH:+$VLLM_PYTHONPATH:}$PYTHONPATH" VLLM_USE_FLASHINFER_SAMPLER=0 \
      "${VLLM_PYTHON:-$("$python" src/qwen3_distill/environments/make.py vllm-cuda)}" \
      -m benchmarks.speed.decode_profile --model models/random-4B --rounds 3 --profile \
      --out "$out/decode_profile.json" "$@"
    ;;
  trl)
    PYTHONPATH="${TRL_PYTHONPATH:+$TRL_PYTHONPATH:}$PYTHONPATH" VLLM_USE_FLASHINFER_SAMPLER=0 \
      measure speed.trl_distillation --student models/random-4B --teacher models/random-8B --name h200_trl \
      --settings 8:off:fixed,16:on:fixed,2:off:longtail8 --max-tokens 2048 "$@"
    ;;
  teachers) # both servers, a context, samples of a prompt; then what aligning two tokenizers takes
    measure teachers.speed --config configs/h200.yaml "${given[@]}" "$@"
    measure teachers.alignment
    ;;
  topk) # where the teacher's server spends the time of the top 16
    PYTHONPATH="${SGLANG_PYTHONPATH:+$SGLANG_PYTHONPATH:}$PYTHONPATH" measure speed.topk_profile "$@"
    ;;
  memory) # the tests of the learner's memory, on the card
    "$python" -m pytest tests/unit/training tests/unit/modeling tests/unit/weights -m gpu --require-gpu -W default "$@"
    ;;
  contract) # an engine's contract suite: vllm, sglang or unsloth
    engine=${1:?"an engine: vllm, sglang or unsloth"} && shift
    interpreter=${engine^^}_PYTHON variable=${engine^^}_PYTHONPATH
    "$python" -m pytest tests/contract -m "$engine" -W default --engine-device cuda \
      --engine "$engine=${!interpreter:-$("$python" src/qwen3_distill/environments/make.py "$engine-cuda")}" \
      ${!variable:+--engine-variable "$engine:PYTHONPATH=${!variable}"} "$@"
    ;;
  together) # all contract suites, doctor and stages of one card
    make gpu-check GPU_PYTHON="$python"
    ;;
  cluster) # a fleet on the cards of this host against one of them
    measure speed.cluster --config benchmarks/speed/cluster.yaml --cards 2 --name cluster_x2 \
      --log "$out/cluster_x2.jsonl" --beside --stagger-s 8 --steps 16 --skip 6 --longtail-steps 24 \
      --longtail-skip 8 --set=roles:generation.kv_cache_gib=45 --set=roles:generation.max_sequences=512 \
      --set=roles:generation.adapters=swap \
      student.model=models/random-4B scoring.model=models/random-8B "${engines[@]}" "$@"
    ;;
  full_tuning)
    measure speed.full_tuning --model models/random-4B --check models/lab/student --ranks 2 \
      --name full_tuning_x2 "$@"
    ;;
  queue) # queue '600:steps --measure topk16' 300:cold; options have no spaces
    failed=()
    for item; do
      read -ra words <<< "${item#*:}"
      echo "--- $(date +%T) ${words[*]}, ${item%%:*} s at the most"
      # Ctrl-C reaches a part as it reaches a part alone, also from a queue that runs in the background.
      timeout -s INT -k 90 "${item%%:*}" env --default-signal=INT bash "$self" "${words[@]}" &
      trap 'kill -INT %% && wait %%; exit 130' INT TERM
      wait $! || failed+=("${item#*:} (status $?)")
    done
    echo "--- $(date +%T) end"
    [ ${#failed[@]} -eq 0 ] || { printf 'error: not done: %s\n' "${failed[@]}" >&2 && exit 1; }
    ;;
  *)
    echo "error: no part is named $part: see the head of $0" >&2
    exit 2
    ;;
esac
