#!/usr/bin/env bash
# The whole pipeline on the built-in model, offline, on two CPU cores: data, SFT, GRPO, agents, evaluation.
# It writes everything to runs/demo (or $RUNS) and removes first what an earlier demo left there.
# Another seed: SEED=1 bash recipes/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; fi
RUNS=${RUNS:-runs/demo}
SEED=${SEED:-0}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # idle threads soon sleep: kinder to a busy machine
if [ -e "$RUNS" ] && [ ! -e "$RUNS/data/settings.json" ]; then
  echo "error: $RUNS is there and holds no demo; choose another RUNS"; exit 2
fi
rm -rf "$RUNS"
stage() { printf '\n==== %s (%d s so far)\n' "$1" "$SECONDS"; shift; "$PYTHON" "$@" --seed "$SEED"; }

stage "1 data: a teacher's worked solutions, verified" \
  make_data.py --out "$RUNS/data"
# --validate 0: all records are trained. Without it, 20 problems are held out and looked at ten times.
stage "2 SFT: a LoRA adapter" \
  train_sft.py --lora --data "$RUNS/data/records.jsonl" --validate 0 --out "$RUNS/sft-lora"
stage "2 SFT: all weights" \
  train_sft.py --full --data "$RUNS/data/records.jsonl" --validate 0 --out "$RUNS/sft-full"
stage "3 GRPO from the SFT adapter" \
  train_grpo.py --adapter "$RUNS/sft-lora/adapter" --out "$RUNS/grpo"
for row in base=tiny sft-lora="$RUNS/sft-lora/adapter" sft-full="$RUNS/sft-full/model" grpo="$RUNS/grpo/adapter"; do
  stage "5 evaluation: ${row%%=*}" \
    eval.py --model "${row#*=}" --data tiny,tiny-unseen --out "$RUNS/eval-${row%%=*}"
done
stage "4 agents: what the base model can do when it is asked otherwise" \
  agents.py --limit 200 --workflow majority_vote,python_tools,solver_checker_stateless --out "$RUNS/agents"

printf '\n==== all stages on the same problems, greedy (%d s in all)\n' "$SECONDS"
"$PYTHON" eval.py --compare "$RUNS"/eval-{base,sft-full,sft-lora,grpo}
printf '\n==== GRPO beside the adapter that it started from\n'
"$PYTHON" eval.py --compare "$RUNS"/eval-{sft-lora,grpo}
"$PYTHON" bench/demo.py "$RUNS"
echo "curves and samples: $RUNS/grpo/report.html"
