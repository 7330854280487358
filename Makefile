# make demo, make test and make docs work on a fresh clone: each creates .venv with the tested versions if needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench docs clean

demo: $(VENV)/.installed
	$(RUN) examples/demo.py

# Two processes with one thread each: the tests' models are too small to share. Tests that start ranks of their own come
# after them: with more processes than cores, ranks would wait for each other most of the time.
test: export OMP_NUM_THREADS := 1
test: export TOKENIZERS_PARALLELISM := false
test: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist loadfile -q --ignore tests/processes
	$(RUN) -m pytest -q tests/processes

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.installed
	$(RUN) benchmarks/machine/bandwidth.py --quick
	$(RUN) benchmarks/overhead.py --quick
	$(RUN) benchmarks/search_quality.py --quick

# The pages of README and docs/, and the API reference, in build/docs.
docs: $(VENV)/.installed-docs
	$(RUN) -m mkdocs build --strict --quiet

$(VENV)/.installed-docs: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build
