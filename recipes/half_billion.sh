#!/usr/bin/env bash
# The whole pipeline on a real model that a laptop can train: Qwen2.5-Coder-0.5B-Instruct on GSM8K, without an
# API. One core needs some 20 hours, a GPU an hour or two. If it was stopped, start it again: a stage that is
# done is left out, a stage that was stopped goes on. On Linux without a GPU, LD_PRELOAD=libtcmalloc_minimal.so.4
# keeps the memory of training at 4.7 GB; two of these runs at the same time gain nothing over one after the other.
#
#   bash recipes/half_billion.sh                  everything, in runs/half_billion
#   bash recipes/half_billion.sh --dry-run        steps, tokens, hours and memory here, by a part of each (data alone: 9 minutes of a core)
#   bash recipes/half_billion.sh sft-self grpo    only these stages, in this order
#   MODEL=path/to/model RUNS=runs/mine DEVICE=cuda bash recipes/half_billion.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/stage.sh
MODEL=${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
RUNS=${RUNS:-runs/half_billion}
DEVICE=(--device "${DEVICE:-auto}")

DATA=(--teacher self --data gsm8k --limit 400 --samples 4 --max-tokens 400 "${DEVICE[@]}")
SFT=(--batch 16 --validate 0 "${DEVICE[@]}")
LORA=(--lora --targets all --lr 2e-4 --dropout 0)
RL=(--data gsm8k --batch 8 --samples 8 --steps 24 --kl 0 --temperature 1 --max-tokens 400 --evaluate 0 "${DEVICE[@]}")
GRPO=("${RL[@]}" --resample 1 --lr 2e-4)
DAPO=("${RL[@]}" --algorithm dapo --resample 2 --lr 1e-4)
GREEDY=(--data gsm8k --limit 500 --max-tokens 400 --batch 192 "${DEVICE[@]}")
MATH=(--data math500 --limit 200 --max-tokens 800 --batch 192 "${DEVICE[@]}")
WORKED=(--data gsm8k --limit 200 --max-tokens 400 --batch 192 "${DEVICE[@]}")
SAMPLED=(--data gsm8k --limit 200 --max-tokens 400 --batch 192 --samples 4 --temperature 1 "${DEVICE[@]}")
STEPS=(--data gsm8k --limit 120 --samples 2 --completions 4 --bisect --max-tokens 400 "${DEVICE[@]}")
SEARCHES=(--data gsm8k --limit 100 --max-tokens 400 --workflow best_of_n,weighted_vote,dvts --budget 1,2,4,8,16
          "${DEVICE[@]}")
ROWS="base sft-self sft-human sft-full sft-full-report grpo grpo-placebo sft-self-seed1 sft-self-long grpo-seed1 dapo dapo-base"
WORKFLOWS="majority_vote python_tools solver_checker_with_tools solver_checker_stateless solver_verifier"

answerer() {
  case $1 in
    base) echo "$MODEL" ;;
    sft-full*) echo "$RUNS/$1/model" ;;
    *) echo "$RUNS/$1/adapter" ;;
  esac
}

learn() {  # ROW OPTIONS: SFT on the model's own solutions
  local row=$1; shift
  stage "$row" train_sft.py --model "$MODEL" --data "$RUNS/data/records.jsonl" "${SFT[@]}" "$@"
}

take() {
  local row
  case $1 in
    # 1. Data: the model's own solutions, the right ones kept. (This script goes on without --resume.)
    data) "$PYTHON" make_data.py --model "$MODEL" "${DATA[@]}" --out "$RUNS/data" ;;
    # 2. SFT on them, by adapters or of all weights, and on as many of GSM8K's own solutions.
    sft-self) learn "$1" "${LORA[@]}" ;;
    sft-self-seed1) learn "$1" "${LORA[@]}" --seed 1 ;;
    sft-self-long) learn "$1" "${LORA[@]}" --seed 1 --epochs 6 ;;  # three times as long as the report trains
    sft-full) learn "$1" --full --lr 1e-5 ;;
    sft-full-report) learn "$1" --full --lr 5e-5 ;;  # the report's rate
    sft-human) stage "$1" train_sft.py --model "$MODEL" --data gsm8k --limit 250 "${LORA[@]}" "${SFT[@]}" ;;
    # 3. GRPO from the SFT adapter, with a coin's toss as the reward, and from the second one. Then as DAPO has it (the
    # loss a mean of all tokens, replies near the limit punished), at half the rate: from that adapter and from base.
    grpo) stage "$1" train_grpo.py --model "$MODEL" --adapter "$RUNS/sft-self/adapter" "${GRPO[@]}" ;;
    grpo-placebo) stage "$1" train_grpo.py --model "$MODEL" --adapter "$RUNS/sft-self/adapter" "${GRPO[@]}" \
      --reward random ;;
    grpo-seed1) stage "$1" train_grpo.py --model "$MODEL" --adapter "$RUNS/sft-self-seed1/adapter" "${GRPO[@]}" \
      --seed 1 ;;
    dapo) stage "$1" train_grpo.py --model "$MODEL" --adapter "$RUNS/sft-self-seed1/adapter" "${DAPO[@]}" --seed 1 ;;
    dapo-base) stage "$1" train_grpo.py --model "$MODEL" "${DAPO[@]}" ;;
    # 4. Agents: eval-ROW:WORKFLOW.  5. Evaluation: the same problems and decoding for all rows.
    eval-*:*) row=${1#eval-}; stage "${1/:/-}" eval.py --model "$(answerer "${row%:*}")" --workflow "${row#*:}" "${WORKED[@]}" ;;
    eval-*) stage "$1" eval.py --model "$(answerer "${1#eval-}")" "${GREEDY[@]}" ;;
    math-*) stage "$1" eval.py --model "$(answerer "${1#math-}")" "${MATH[@]}" ;;
    sampled-*) stage "$1" eval.py --model "$(answerer "${1#sampled-}")" "${SAMPLED[@]}" ;;
    # 6. Search: what becomes of the steps of the second SFT adapter's solutions, a verifier that learns it, and
    # searches with that verifier at several budgets.
    steps) "$PYTHON" make_data.py steps --model "$RUNS/sft-self-seed1/adapter" "${STEPS[@]}" --out "$RUNS/steps" ;;
    verifier) stage "$1" train_sft.py --model "$MODEL" --data "$RUNS/steps/hard.jsonl" "${LORA[@]}" "${SFT[@]}" ;;
    searches) stage "$1" agents.py --model "$MODEL" --adapter "solver=$RUNS/sft-self-seed1/adapter" \
      --adapter "verifier=$RUNS/verifier/adapter" "${SEARCHES[@]}" ;;
    *) echo "error: stage $1: expected data, a row ($ROWS), eval-ROW, sampled-ROW, math-ROW, eval-ROW:WORKFLOW, steps, verifier or searches"; exit 2 ;;
  esac
}

if [ "${1:-}" = --dry-run ]; then
  for script in "make_data.py ${DATA[*]}" "train_sft.py --data gsm8k --limit 250 ${LORA[*]} ${SFT[*]}" \
      "train_grpo.py ${GRPO[*]}" "eval.py ${GREEDY[*]} --batch 64" "eval.py ${SAMPLED[*]} --batch 64"; do
    printf '\n==== %s\n' "$script"
    "$PYTHON" $script --model "$MODEL" --dry-run
  done
  exit
fi

if [ $# -gt 0 ]; then
  for one in "$@"; do take "$one"; done
  exit
fi
for one in data ${ROWS#base}; do take "$one"; done
for row in $ROWS; do take "eval-$row"; take "sampled-$row"; done
for row in base sft-self-seed1 dapo; do take "math-$row"; done
for one in steps verifier searches; do take "$one"; done
for row in base dapo; do
  for workflow in $WORKFLOWS; do take "eval-$row:$workflow"; done
done
greedy=(); for row in $ROWS; do greedy+=("$RUNS/eval-$row"); done
"$PYTHON" eval.py --compare "${greedy[@]}"
"$PYTHON" eval.py --compare "${greedy[@]/eval-/sampled-}"
