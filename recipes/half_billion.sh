#!/usr/bin/env bash
# The whole pipeline on a real model that a laptop can train: Qwen2.5-Coder-0.5B-Instruct on GSM8K, without an
# API. One core needs some 20 hours, a GPU an hour or two. If it was stopped, start it again: a stage that is
# done is left out, a stage that was stopped goes on.
#
#   bash recipes/half_billion.sh                  everything, in runs/half_billion
#   bash recipes/half_billion.sh --dry-run        steps, tokens, hours and memory here, after some minutes
#   bash recipes/half_billion.sh sft-self grpo    only these stages, in this order
#   MODEL=path/to/model RUNS=runs/mine DEVICE=cuda bash recipes/half_billion.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; fi
MODEL=${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
RUNS=${RUNS:-runs/half_billion}
DEVICE=(--device "${DEVICE:-auto}")

DATA=(--teacher self --data gsm8k --limit 400 --samples 4 --max-tokens 400)
SFT=(--lora --targets all --batch 16 --epochs 2 --lr 2e-4 --dropout 0 --validate 0)
GRPO=(--data gsm8k --batch 8 --samples 8 --resample 1 --steps 40 --lr 1e-4 --kl 0 --temperature 1
      --max-tokens 400 --evaluate 0)
GREEDY=(--data gsm8k --limit 500 --max-tokens 400 --batch 192)
SAMPLED=(--data gsm8k --limit 200 --max-tokens 400 --batch 192 --samples 4 --temperature 1)
ROWS="base sft-self sft-human grpo grpo-placebo grpo-base grpo-seed1"
WORKFLOWS="majority_vote python_tools solver_checker_with_tools solver_checker_stateless solver_verifier"

# run FOLDER SCRIPT OPTIONS: a run whose result is there is done, and is left out. A run with settings but no
# result was stopped, and goes on.
run() {
  local out="$RUNS/$1" resume=""; shift
  if [ -e "$out/summary.json" ] || [ -d "$out/adapter" ] || [ -d "$out/model" ]; then return; fi
  if [ -e "$out/settings.json" ]; then resume=--resume; fi
  printf '\n==== %s: %s\n' "$(date +%H:%M)" "$out"
  "$PYTHON" "$@" "${DEVICE[@]}" --out "$out" $resume
}

answerer() { if [ "$1" = base ]; then echo "$MODEL"; else echo "$RUNS/$1/adapter"; fi; }

stage() {
  local row
  case $1 in
    # 1. Data: the model's own solutions, the right ones kept. (This script goes on without --resume.)
    data) "$PYTHON" make_data.py --model "$MODEL" "${DATA[@]}" "${DEVICE[@]}" --out "$RUNS/data" ;;
    # 2. SFT on them, and on as many of GSM8K's own solutions.
    sft-self) run "$1" train_sft.py --model "$MODEL" --data "$RUNS/data/records.jsonl" "${SFT[@]}" ;;
    sft-human) run "$1" train_sft.py --model "$MODEL" --data gsm8k --limit 250 "${SFT[@]}" ;;
    # 3. GRPO from the SFT adapter, with another seed, with a coin's toss as the reward, and from base.
    grpo) run "$1" train_grpo.py --model "$MODEL" --adapter "$RUNS/sft-self/adapter" "${GRPO[@]}" ;;
    grpo-seed1) run "$1" train_grpo.py --model "$MODEL" --adapter "$RUNS/sft-self/adapter" "${GRPO[@]}" --seed 1 ;;
    grpo-placebo) run "$1" train_grpo.py --model "$MODEL" --adapter "$RUNS/sft-self/adapter" "${GRPO[@]}" \
      --reward random ;;
    grpo-base) run "$1" train_grpo.py --model "$MODEL" "${GRPO[@]}" ;;
    # 4. Agents: eval-ROW:WORKFLOW.  5. Evaluation: the same problems and decoding for all rows.
    eval-*:*) row=${1#eval-}; run "${1/:/-}" eval.py --model "$(answerer "${row%:*}")" --workflow "${row#*:}" "${GREEDY[@]}" ;;
    eval-*) run "$1" eval.py --model "$(answerer "${1#eval-}")" "${GREEDY[@]}" ;;
    sampled-*) run "$1" eval.py --model "$(answerer "${1#sampled-}")" "${SAMPLED[@]}" ;;
    *) echo "error: stage $1: expected data, a row ($ROWS), eval-ROW, sampled-ROW or eval-ROW:WORKFLOW"; exit 2 ;;
  esac
}

if [ "${1:-}" = --dry-run ]; then
  for script in "train_sft.py --data gsm8k --limit 250 ${SFT[*]}" "train_grpo.py ${GRPO[*]}"; do
    printf '\n==== %s\n' "$script"
    "$PYTHON" $script --model "$MODEL" "${DEVICE[@]}" --dry-run
  done
  exit
fi

if [ $# -gt 0 ]; then
  for one in "$@"; do stage "$one"; done
  exit
fi
for one in data ${ROWS#base}; do stage "$one"; done
for row in $ROWS; do stage "eval-$row"; stage "sampled-$row"; done
for row in base grpo; do
  for workflow in $WORKFLOWS; do stage "eval-$row:$workflow"; done
done
greedy=(); for row in $ROWS; do greedy+=("$RUNS/eval-$row"); done
"$PYTHON" eval.py --compare "${greedy[@]}"
"$PYTHON" eval.py --compare "${greedy[@]/eval-/sampled-}"
