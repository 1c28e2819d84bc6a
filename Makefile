# make demo   16 labelled images and a page to look at them; installs what they need into .venv, 1.2 GB, or 5 with a
#             torch that was built for CUDA
# make check  lint, types and the core tests: under a minute on two cores
# make test   every test                    make lint   the linter, the formatter and the types
# make docs   the documentation site in site/; its libraries go into an environment of their own
# make venv   installs what tests need, too: optional engines and formats, 1.5 GB more
# make consumers  exports read by pycocotools, supervision, datumaro, cityscapesScripts, datasets and webdataset, learnt from by
#                 models of transformers, the gallery in Chromium, and runs in moto's S3 server: 10 minutes
# make soak   kills, faults, planted damage, hostile input and long runs in full: up to an hour on two cores, figures at the end;
#             then 300 faults that are drawn at random, one at a time: two hours more
# make mutants  the planted faults of tests/planted.py, one at a time: minutes on two cores; 95 % have to be noticed
# Variables: PYTHON=python3.12, TORCH=torch==2.11.0 and PIP_FLAGS=... choose another interpreter, torch and pip options.
# VENV=/path/of/environment TORCH= installs the locked versions into an environment that has its own torch, which stays.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
HASHES ?= --require-hashes
# of tests: one more than two cores, as some tests wait
WORKERS ?= 3

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.datasetdm-libraries
TESTING := $(VENV)/.datasetdm-test-libraries
BUILT := $(VENV)/.datasetdm-built
# A spinning OpenMP pool starves its neighbours as soon as there are more threads than cores.
QUIET_CORES := OMP_WAIT_POLICY=PASSIVE

.PHONY: venv demo check test docs consumers soak mutants lint clean
venv: $(BUILT) $(TESTING)

# What pip would miss after minutes, in pages of output.
define CHECK
import os, shutil, sys, sysconfig
compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
header = os.path.join(sysconfig.get_path("include"), "Python.h")
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed; name one with PYTHON=python3.12")
if not shutil.which(compiler):
    sys.exit(f"A C++ compiler is needed, and {compiler} is not there; install one (apt install g++) or name it with CXX=")
if not os.path.isfile(header):
    sys.exit(f"{header} is needed to compile; install it (apt install python3-dev) or name another Python with PYTHON=")
endef
export CHECK

# torch comes first and by itself, so that pip takes the build the machine offers; nothing of the locks exchanges it, nor the
# Triton that a torch built for CUDA brings. Every other file has to have one of the lock's digests (HASHES= asks for none).
# What is never imported is never compiled, which is a fifth of all bytes.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c "$$CHECK"
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) install --no-compile $(PIP_FLAGS) $(TORCH))
	grep -v "^torch==" requirements.lock > $(VENV)/requirements.txt
	$(PIP) install --no-compile $(PIP_FLAGS) --no-deps $(HASHES) -r $(VENV)/requirements.txt
	touch $@

$(TESTING): tests/requirements.lock $(INSTALLED)
	theirs=none; $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' && theirs=triton; \
	grep -v "^$$theirs==" tests/requirements.lock > $(VENV)/test-requirements.txt
	$(PIP) install --no-compile $(PIP_FLAGS) --no-deps $(HASHES) -r $(VENV)/test-requirements.txt
	touch $@

$(BUILT): $(INSTALLED) setup.py pyproject.toml $(wildcard csrc/*)
	@$(PYTHON) -c "$$CHECK"
	$(PIP) install $(PIP_FLAGS) --no-build-isolation --no-deps -e .
	touch $@

demo: $(BUILT)
	$(QUIET_CORES) $(BIN)/python -m datasetdm_fast.generate

test: venv
	$(QUIET_CORES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: lint
	$(QUIET_CORES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m core

DOCS := $(VENV)-docs
$(DOCS)/.installed: docs/site/requirements.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install $(PIP_FLAGS) -r $<
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build

# What reads exports asks for other versions than the product, so it has an environment of its own, without the product.
CONSUMERS := $(VENV)-consumers
$(CONSUMERS)/.installed: tests/consumers/requirements.txt tests/consumers/browser.txt tests/consumers/store.txt | $(BUILT)
	test -x $(CONSUMERS)/bin/python || $(PYTHON) -m venv $(CONSUMERS)
	$(CONSUMERS)/bin/python -m pip --disable-pip-version-check install $(PIP_FLAGS) -r $<
	$(PIP) install $(PIP_FLAGS) --target $(CONSUMERS)/browser -r tests/consumers/browser.txt
	$(PIP) install $(PIP_FLAGS) --target $(CONSUMERS)/peft --no-deps peft==0.21.2 accelerate==1.15.0
	$(PIP) install $(PIP_FLAGS) --target $(CONSUMERS)/store -r tests/consumers/store.txt
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	PYTHONPATH=$(CONSUMERS)/browser $(BIN)/python -m playwright install --only-shell chromium || true
	touch $@

consumers: venv $(CONSUMERS)/.installed
	exported=$$(mktemp -d) && trap 'rm -rf "$$exported"' EXIT && \
	$(QUIET_CORES) $(BIN)/python tests/consumers/prepare.py "$$exported" && cd "$$exported" && \
	HF_HUB_OFFLINE=1 HF_HOME="$$exported/cache" EXPORTED="$$exported" $(abspath $(CONSUMERS))/bin/python -m pytest -q \
	--noconftest -c /dev/null --rootdir "$$exported" -p no:cacheprovider $(CURDIR)/tests/consumers/read_back.py
	$(QUIET_CORES) OMP_NUM_THREADS=1 DATASETDM_LONG_TESTS=1 PYTHONPATH=$(abspath $(CONSUMERS))/browser \
	$(BIN)/python -m pytest -q -n $(WORKERS) tests/test_trainers.py tests/test_gallery_page.py
	$(QUIET_CORES) PYTHONPATH=$(abspath $(CONSUMERS))/peft $(BIN)/python -m pytest -q tests/test_family_adapters.py
	$(QUIET_CORES) OMP_NUM_THREADS=1 DATASETDM_LONG_TESTS=1 PYTHONPATH=$(abspath $(CONSUMERS))/store \
	$(BIN)/python -m pytest -q tests/test_s3.py

# Longest first, as they are dealt out in this order; what hangs is ended after the hour.
SOAKED := $(addprefix tests/test_,$(addsuffix .py,long_runs faults fuzz audit ranks rehearsal sampling launchers package \
proofs to_tensorrt claims students judge bench gpu_race kernels ray readers train drop export verify plugins checkpoints \
trainers domain mmdit openvino sample_stream finite families speed))
soak: venv
	$(QUIET_CORES) OMP_NUM_THREADS=1 DATASETDM_LONG_TESTS=1 \
	timeout --kill-after=60 3600 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -rA --durations=25 $(SOAKED)
	$(QUIET_CORES) $(BIN)/python tests/drawn_mutants.py --number 300 --workers $(WORKERS)

mutants: venv
	$(QUIET_CORES) $(BIN)/python tests/mutants.py --workers $(WORKERS)

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv .venv-consumers .venv-docs build site datasetdm_fast.egg-info datasetdm_fast/_C.*.so .pytest_cache .ruff_cache
