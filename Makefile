# make demo | test | check | asan | clean. Everything is installed into .venv; nothing has to be done by hand.

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

# python3 where it is new enough, else a newer one beside it; `make PYTHON=...` overrides.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)

.PHONY: demo test lint wheel check asan clean

demo: $(VENV)/.installed-run
	@$(VENV)/bin/flashinfer demo

test: $(VENV)/.installed-test
	$(RUN) -m pytest -n auto

check: lint wheel test

lint: $(VENV)/.installed-check
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

wheel: $(VENV)/.installed-check
	rm -rf dist
	$(RUN) -m build --wheel
	$(RUN) -m zipfile --list dist/*.whl | grep flashinfer/layouts/llama.toml

# The native core built with AddressSanitizer, in a copy of the package that comes first on the path; gcc or clang.
# (The hook of the editable install would find the usual build before it.)
ASAN = build/asan
ASAN_TESTS = import sys; sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]; \
	from flashinfer.native import _ring; assert "asan" in _ring.__file__, _ring.__file__; \
	import pytest; sys.exit(pytest.main(sys.argv[1:]))
asan: $(VENV)/.installed-check
	cmake -S flashinfer/native -B $(ASAN)/native -DFLASHINFER_ASAN=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DPython_EXECUTABLE="$$($(RUN) -c 'import sys; print(sys.executable)')"
	cmake --build $(ASAN)/native --parallel
	rm -rf $(ASAN)/tree && mkdir -p $(ASAN)/tree
	cp -R flashinfer layouts tests pyproject.toml $(ASAN)/tree/
	cp $(ASAN)/native/_*.so $(ASAN)/tree/flashinfer/native/
	cd $(ASAN)/tree && LD_PRELOAD="$(foreach l,asan stdc++,$(shell $(CXX) -print-file-name=lib$l.so))" ASAN_OPTIONS=detect_leaks=0 \
		$(abspath $(RUN)) -c '$(ASAN_TESTS)' tests/io tests/backend tests/cache

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What holds more serves for what holds less: the core is compiled once.
$(VENV)/.installed-run: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-test: SERVES := run
$(VENV)/.installed-check: EXTRAS := [test,check]
$(VENV)/.installed-check: SERVES := run test
# An editable installation knows each module's place and holds the compiled core: again when either changes.
SOURCES := $(wildcard flashinfer/native/*.*pp flashinfer/native/*.cmake flashinfer/native/CMakeLists.txt)
FOLDERS := $(shell find flashinfer -type d -not -name __pycache__)
$(VENV)/.installed-%: pyproject.toml $(SOURCES) $(FOLDERS) | $(RUN)
	@echo "installing into $(VENV) (again when pyproject.toml, the C++ sources or the set of modules change)"
	$(PIP) --editable '.$(EXTRAS)'
	$(RUN) -m compileall -q flashinfer  # now, so that the first run changes no folder
	@touch $@ $(SERVES:%=$(VENV)/.installed-%)

$(RUN):
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed and none was found;" \
		"install one, or say which: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { echo "error: $(PYTHON) is not Python 3.11 or newer" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
