# make demo   trains the shipped tiny model by ROSD and by SDPO, full-response self-distillation, and prints scores
#             before and after, on the CPU, or on an accelerator whose jax build is in .venv (README, the real run)
# make test   the test suite, about ten minutes on two cores (make test-fast leaves out what takes more than ten
#             seconds; make test-nightly runs what make test leaves out: the longest tests, and repetitions)
# make docs   the documentation as a site, in site/
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
BIN := .venv/bin
# A file's tests run in one process, which shares what they compile; conftest.py puts the slow files first.
# A worker that dies ends the run: xdist would give the same test to the next worker, and hang in the end.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0
# A jax that can drive a TPU looks for one for seconds, and complains where there is none.
ACCELERATORS := $(wildcard /dev/accel* /dev/vfio/[0-9]* /dev/nvidia[0-9]*)

.PHONY: demo test test-fast test-nightly lint docs clean

demo: export JAX_PLATFORMS ?= $(if $(ACCELERATORS),,cpu)
demo: $(BIN)/.installed
	$(BIN)/python -m rosd_jax.evals.study --config=configs/quickstart.py --methods=rosd,sdpo --seeds=0 --out=runs/demo

test: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(PYTEST) -m "not nightly"

test-fast: $(BIN)/.installed-dev
	$(PYTEST) -m "not slow and not nightly"

test-nightly: $(BIN)/.installed-dev
	$(PYTEST) -m nightly

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(BIN)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site is in site/; to search it, serve it: $(BIN)/python -m http.server -d site"

clean:
	rm -rf .venv site

$(BIN)/.installed: requirements.txt requirements-lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing packages into .venv: about 1.4 GB, for some minutes; pip prints nothing meanwhile"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -c requirements-lock.txt
	touch $@

$(BIN)/.installed-docs: $(BIN)/.installed requirements-docs.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-docs.txt -c requirements-lock.txt
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed requirements-dev.txt requirements-docs.txt requirements-track.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt -c requirements-lock.txt
	touch $@
