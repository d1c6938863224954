# What the recipes of long runs share. They source it in the repository's root, with RUNS set.
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; fi

# stage FOLDER SCRIPT OPTIONS runs one stage. A stage whose result is there is done, and is left out. A stage with
# settings but no result was stopped, and goes on.
stage() {
  local out="$RUNS/$1" resume="" result; shift
  for result in summary.json table.json adapter model; do
    if [ -e "$out/$result" ]; then return; fi
  done
  if [ -e "$out/settings.json" ]; then resume=--resume; fi
  printf '\n==== %s: %s\n' "$(date +%H:%M)" "$out"
  "$PYTHON" "$@" --out "$out" $resume
}
