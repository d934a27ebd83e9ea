# make demo   trains the shipped tiny model by ROSD on this machine's CPU and prints before and after
# make test   the whole test suite (make test-fast leaves out what takes more than ten seconds)
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-fast lint clean

demo: $(BIN)/.installed
	$(BIN)/python run.py --config=configs/quickstart.py

test: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(BIN)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv

$(BIN)/.installed: requirements.txt requirements-lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -c requirements-lock.txt
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt -c requirements-lock.txt
	touch $@
