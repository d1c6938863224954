#!/usr/bin/env bash
# The report's pipeline on Qwen2.5-Math-1.5B: 19,473 problems (two have no gold answer), SFT, GRPO, agents,
# evaluation. It needs one GPU of 40 GB or more. Stage 1 needs the teachers' keys in the environment;
# recipes/report.toml names the variables. Stages 2 to 5 need the hub, or local directories in place of the names.
# If it was stopped, start it again: it goes on where it was.
#
#   bash recipes/paper.sh                 everything, in runs/paper
#   MODEL=path/to/model BUDGET=20 bash recipes/paper.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/stage.sh
MODEL=${MODEL:-Qwen/Qwen2.5-Math-1.5B}
RUNS=${RUNS:-runs/paper}
TEST=(--data gsm8k,math500 --limit 500 --max-tokens 2048)

# 1. Data: round 1 asks one teacher for everything, round 2 asks another for what is left. This script goes on
# without --resume.
"$PYTHON" make_data.py --data gsm8k,math --cascade recipes/report.toml --budget "${BUDGET:-50}" --out "$RUNS/data"

# 2. SFT, LoRA and full: batch 128, 2 epochs, cosine, 1e-4 and 5e-5 are the defaults.
stage sft-lora train_sft.py --model "$MODEL" --data "$RUNS/data/records.jsonl" --lora
stage sft-full train_sft.py --model "$MODEL" --data "$RUNS/data/records.jsonl" --full

# 3. GRPO from the LoRA adapter: K = 2, batch 16, KL 0.05, 5e-6 are the defaults. The default adapter is on all
# linear layers; here it is as in stage 2.
stage grpo train_grpo.py --model "$MODEL" --adapter "$RUNS/sft-lora/adapter" --data gsm8k --targets qkvo

# 5. Evaluation: every stage, the same problems, the same greedy decoding.
stage eval-base eval.py --model "$MODEL" "${TEST[@]}"
stage eval-lora eval.py --model "$RUNS/sft-lora/adapter" "${TEST[@]}"
stage eval-full eval.py --model "$RUNS/sft-full/model" "${TEST[@]}"
stage eval-grpo eval.py --model "$RUNS/grpo/adapter" "${TEST[@]}"

# 4. Agents: all workflows beside a single pass.
stage agents agents.py --model "$RUNS/grpo/adapter" --data gsm8k --limit 500 --workflow all

"$PYTHON" eval.py --compare "$RUNS"/eval-{base,lora,full,grpo}
