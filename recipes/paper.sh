#!/usr/bin/env bash
# The report's pipeline on Qwen2.5-Math-1.5B: 19,473 problems, SFT, GRPO, agents, evaluation. One GPU of 40 GB or
# more. Stage 1 needs the teachers' keys in the environment, as recipes/report.toml names them; stages 2 to 5
# need the hub (or local directories in the place of the names).
#
#   bash recipes/paper.sh                 everything, in runs/paper
#   MODEL=path/to/model bash recipes/paper.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; fi
MODEL=${MODEL:-Qwen/Qwen2.5-Math-1.5B}
RUNS=${RUNS:-runs/paper}
TEST="--data gsm8k,math500 --limit 500 --max-tokens 2048"

# 1. Data: round 1 asks one teacher for everything, round 2 another for what is left.
$PYTHON make_data.py --data gsm8k,math --cascade recipes/report.toml --out $RUNS/data

# 2. SFT, LoRA and full: batch 128, 2 epochs, cosine, 1e-4 and 5e-5 are the defaults.
$PYTHON train_sft.py --model $MODEL --data $RUNS/data/records.jsonl --lora --out $RUNS/sft-lora
$PYTHON train_sft.py --model $MODEL --data $RUNS/data/records.jsonl --full --out $RUNS/sft-full

# 3. GRPO from the LoRA adapter: K = 2, batch 16, KL 0.05, 5e-6 are the defaults.
$PYTHON train_grpo.py --model $MODEL --adapter $RUNS/sft-lora/adapter --data gsm8k --out $RUNS/grpo

# 5. Evaluation: every stage, the same problems, the same greedy decoding.
$PYTHON eval.py --model $MODEL $TEST --out $RUNS/eval-base
$PYTHON eval.py --model $RUNS/sft-lora/adapter $TEST --out $RUNS/eval-lora
$PYTHON eval.py --model $RUNS/sft-full/model $TEST --out $RUNS/eval-full
$PYTHON eval.py --model $RUNS/grpo/adapter $TEST --out $RUNS/eval-grpo

# 4. Agents: all workflows beside a single pass.
$PYTHON agents.py --model $RUNS/grpo/adapter --data gsm8k --limit 500 --workflow all --out $RUNS/agents

$PYTHON eval.py --compare $RUNS/eval-base $RUNS/eval-lora $RUNS/eval-full $RUNS/eval-grpo
