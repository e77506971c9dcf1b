# `make demo` and `make test` need a Linux machine with Python 3.11 or newer, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
INSTALLED := $(VENV)/.installed
# One thread per test process: two processes with two threads each are slower than either.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q

.PHONY: install demo lint test test-exhaustive test-all clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)/runs $(DEMO)/predictions $(DEMO)/compare
	$(BIN)/seg-attn data sample $(DEMO)/data
	$(BIN)/seg-attn fit --config configs/sample.yaml --data.root $(DEMO)/data --trainer.default_root_dir $(DEMO)/runs
	$(BIN)/seg-attn test --config configs/sample.yaml --data.root $(DEMO)/data --trainer.default_root_dir $(DEMO)/runs \
		--ckpt_path $(DEMO)/runs/fit/version_0/checkpoints/best.ckpt
	xargs -I% echo $(DEMO)/data/VOCdevkit/VOC2012/JPEGImages/%.jpg \
		< $(DEMO)/data/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt \
		| xargs $(BIN)/seg-attn predict --ckpt_path $(DEMO)/runs/fit/version_0/checkpoints/best.ckpt \
		--save mask,overlay --output $(DEMO)/predictions --input
	$(BIN)/seg-attn compare --config configs/sample.yaml --data.root $(DEMO)/data --output_stride 8 16 --baseline 16 \
		--ckpt_path $(DEMO)/runs/fit/version_0/checkpoints/best.ckpt --output $(DEMO)/compare
	@echo "masks and overlays: $(DEMO)/predictions, label next to prediction per epoch: $(DEMO)/runs/fit/version_0/panels, comparison: $(DEMO)/compare/compare.html"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not exhaustive"

# What `make test` leaves out: whole families, whole matrices, long sweeps.
test-exhaustive: $(INSTALLED)
	$(PYTEST) -m exhaustive

test-all: test test-exhaustive

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
