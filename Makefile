# make demo    the whole pipeline on the built-in model, offline, minutes on two CPU cores
# make test    every fast test; make test-slow and make test-parity need minutes, or real weights
# make test-browser  the pages of runs in a real browser; as root on Debian it installs chromium first
# make bench   side-by-side measurements against peers
# make results  prints the tables of RESULTS.md that results/ holds, and draws their figures
# make house   draws docs/house.svg anew, after an import was added or removed
# Each sets up .venv by itself. Another Python (3.11 or newer): make demo PYTHON=python3.12

PYTHON ?= python3
PY := .venv/bin/python
# one thread a worker: two pytest workers share two cores
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest

.PHONY: demo test test-slow test-parity test-browser bench results lint house clean

demo: .venv/.run
	PYTHON=$(PY) bash recipes/demo.sh

test: .venv/.dev
	$(TEST) -n 2

test-slow: .venv/.dev
	$(TEST) -m slow

test-parity: .venv/.dev
	$(TEST) -m parity -s

test-browser: .venv/.dev
	@command -v chromium >/dev/null || \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y chromium; } >/dev/null 2>&1 || \
	  echo "The browser tests are skipped: no chromium here, and none could be installed (on Debian: apt-get install chromium)."
	$(TEST) -m browser

bench: .venv/.dev
	for b in grader sandbox sampler; do $(PY) bench/$$b.py || exit 1; done

results: .venv/.run
	$(PY) bench/demo.py --table
	$(PY) bench/half_billion.py
	for b in objectives verifiers roles self_evolution budgets; do $(PY) bench/$$b.py --table || exit 1; done

lint: .venv/.dev
	$(PY) -m ruff check .

house: .venv/.run
	$(PY) docs/draw_house.py

clean:
	rm -rf .venv runs

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.run: requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ .venv/.run
