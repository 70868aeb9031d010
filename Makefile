# Everything runs inside .venv, which is made on first use and left alone until its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# torch goes first and by itself: on a machine that has a CPU wheel of it at hand, nothing
# that follows may replace it by a build with gigabytes of CUDA libraries
TORCH := torch==2.13.0

export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo study-quick test lint types wheel check peers bench conformance hosts vllm verl test-hosts clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# the main job: best-of-50 on the held-out puzzles with the model that ships
demo: $(READY)
	$(BIN)/sharpen bon --model game24 --task game24 --split test -n 50 \
	    --reward logprob --max-new-tokens 48 --seed 0 --out runs/demo

# every selector, sampler and trained model in small, from nothing
study-quick: $(READY)
	rm -rf runs/study-quick
	OMP_NUM_THREADS=1 $(BIN)/sharpen study game24 --quick --out runs/study-quick

# JOBS processes side by side, each on one thread: make test JOBS=8
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test: $(READY)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

# the wheel, used in a fresh environment that holds it and its dependencies, nothing else
wheel: $(READY)
	rm -rf build/wheel
	$(BIN)/python -m build --quiet --outdir build/wheel .
	$(BIN)/python tests/wheel_check.py build/wheel

check: lint types test wheel

# what bench/ compares with, apart from the environment so that no test sees it; each is
# installed without its dependencies, and one that is not to be had is named in the results
PEERS := $(VENV)/peers
peers: $(PEERS)/.ready

$(PEERS)/.ready: $(READY) constraints.txt
	@mkdir -p $(PEERS); missing=; \
	for peer in trl liger-kernel cut-cross-entropy verl flash-attn; do \
	    FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
	    $(BIN)/python -m pip install --quiet --retries 1 --upgrade --no-deps --no-build-isolation \
	        --constraint constraints.txt --target $(PEERS) $$peer || missing="$$missing $$peer"; \
	done; \
	rm -rf $(PEERS)/tests $(PEERS)/scripts $(PEERS)/hopper; \
	if [ -z "$$missing" ]; then touch $@; else echo "make peers: not to be had:$$missing"; fi

# the hosts of sharpen/integrations, in an environment of their own: what `make test` runs in
# stays free of them
HOSTS := .venv-hosts
hosts: $(HOSTS)/.ready

$(HOSTS)/.ready: pyproject.toml setup.py constraints.txt constraints-hosts.txt
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet $(TORCH)
	$(HOSTS)/bin/python -m pip install --quiet --constraint constraints.txt \
	    --constraint constraints-hosts.txt --editable ".[dev,hosts]"
	touch $@

# vLLM pins another transformers; its own torchvision cannot load beside a CPU torch
VLLM := .venv-vllm
vllm: $(VLLM)/.ready

$(VLLM)/.ready: setup.py constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM)/bin/python -m pip install --quiet --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# verl's reward loop, with the transformers that it takes
VERL := .venv-verl
verl: $(VERL)/.ready

$(VERL)/.ready: setup.py constraints-verl.txt
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install --quiet $(TORCH)
	$(VERL)/bin/python -m pip install --quiet --requirement constraints-verl.txt
	$(VERL)/bin/python -m pip install --quiet --no-deps verl==0.9.1
	$(VERL)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# real runs of every host; those of vLLM and verl too where `make vllm` and `make verl` were run
test-hosts: $(HOSTS)/.ready
	SHARPEN_HOSTS=1 OMP_NUM_THREADS=1 $(HOSTS)/bin/python -m pytest -q -n $(JOBS) \
	    --dist worksteal tests/hosts

# every task; make bench OUT=bench/results/FILE.jsonl appends the rows to a file
bench: $(READY) peers
	$(BIN)/python -m pytest bench -q --benchmark-only --benchmark-quiet $(if $(OUT),--out $(OUT))

conformance: $(READY) peers
	$(BIN)/python -m bench.conformance

clean:
	rm -rf $(VENV) $(HOSTS) $(VLLM) $(VERL) build dist runs *.egg-info
