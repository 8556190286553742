# Every target runs commands that a person could type. `make help` lists them.

# The first of these found, unless the caller names one: make setup PYTHON=python3.12
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do command -v $$name && break; done)
UV := .venv/bin/uv
COMPILE := $(UV) pip compile --quiet --no-annotate --no-emit-index-url --custom-compile-command "make lock" --python-version 3.11
# What `make lock` may change: nothing that still fits, or with UPGRADE=--upgrade everything.
UPGRADE ?=
# A worker a processor; a file's tests stay together, since they share what is made once for the file.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder
# A command in an environment that uv makes from a lock and keeps in its cache, for what does not agree with .venv.
ALONE := $(UV) run --no-project --isolated --python .venv/bin/python --with-requirements
# With bytecode, or each of the many processes of the tests compiles all code again.
PYTEST := env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m pytest $(PARALLEL)
# Further words for pytest: make test ARGS="-k schema"
ARGS ?=
# The image's name, and where local-train leaves what SageMaker would have under /opt/ml.
IMAGE ?= dalle-sagemaker
OUT ?= out/local
PORT ?= 8080
# What `make play` serves: the first of these that has a model.
ROOT ?= $(patsubst %/model,%,$(firstword $(wildcard out/demo/ml/model $(OUT)/model) out/demo/ml/model))

.DEFAULT_GOAL := help
.PHONY: help setup check check-template check-sdk2 lint format test test-any-user soak soak-training soak-serving fuzz demo play picture docs tree bench-peers bench-rainbow bench-training bench-costs image test-image local-train local-serve local-endpoint lock clean

help:  ## list these targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | expand -t 13

setup: .venv/.stamp  ## make .venv with every dependency, by hash, and the commands `train` and `serve`

check: lint  ## lint, and the tests that take less than a third of a second each: before every commit
	$(PYTEST) -m "not docker and not slow" $(ARGS)

lint: setup  ## ruff, the formatter, spelling, imports and types; changes nothing
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/codespell && .venv/bin/lint-imports --no-logo && .venv/bin/mypy

check-template: setup  ## cfn-lint and checkov over the stack's template; what they may find is explained in it
	.venv/bin/cfn-lint --non-zero-exit-code informational infra/setup/template.yaml
	$(ALONE) requirements/checkov.txt checkov --quiet --compact --skip-download --framework cloudformation --file infra/setup/template.yaml

check-sdk2: setup  ## the SageMaker SDK v2 trains, serves and transforms, in a simulated account
	.venv/bin/python -m pytest -m docker tests/infra/sdk $(ARGS)

format: setup  ## mend what ruff can mend, and lay out the code
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

test: setup  ## run the tests and name the ten slowest; no network, no GPU, no Docker
	$(PYTEST) -m "not docker" --durations 10 $(ARGS)

test-any-user: setup  ## the tests as a user id without a name, on a read-only checkout; needs root. ARGS=tests/dalle runs a part
	tests/any_user.sh $(PARALLEL) $(ARGS)

soak: soak-training soak-serving  ## ten minutes of what goes wrong: training killed again and again, serving under load

soak-training: setup  ## interrupt training at random moments, on one host and on two; the weights must not differ by a bit
	.venv/bin/python -m training.soak --out out/soak --kills 50 $(ARGS)
	.venv/bin/python -m training.soak --out out/soak --kills 6 --hosts 2 $(ARGS)

soak-serving: setup  ## clients of every kind at `serve` for 10 minutes; ARGS="--minutes 60"
	.venv/bin/python -m tests.inference.soak_serving $(ARGS)

fuzz: setup  ## 100,000 hostile requests at `serve`, 10,000 made from its schema, and 2,000 hostile files, from a seed; ARGS="--requests 1000 --seed 1"
	.venv/bin/python -m tests.fuzz $(ARGS)

demo: setup  ## train on small synthetic pictures, serve, and ask for captions never seen: out/demo/report.html
	.venv/bin/python -m training.demo --out out/demo

play: setup  ## serve a model of `make demo` or `make local-train` with a page to play with it; ROOT=DIR serves another
	DALLE_PLAYGROUND=1 .venv/bin/serve --root $(ROOT) --host 127.0.0.1 --port $(PORT)

picture: setup  ## take the README's picture of the page again, with the model of `make play`
	.venv/bin/python -m tests.inference.playground.picture --root $(ROOT) --out inference/playground.png

docs: setup  ## write the generated parts of the README.md files again, and the pages of costs
	PYTHONPATH="$(CURDIR)" .venv/bin/python tests/repository/test_readme.py
	PYTHONPATH="$(CURDIR)" .venv/bin/python tests/repository/test_readme_infra.py
	.venv/bin/python -m infra.compare.report render $(dir $(wildcard infra/reports/*/compare.html))

tree:  ## what every file is, by its own first line
	@grep -rnm1 --include='*.py' '"""' container training inference infra | sed -E 's/^([^:]*):[0-9]+:"""/\1\t/; s/"""$$//' | sort | expand -t 36

bench-peers: setup  ## measure drawing beside DALLE-pytorch 1.6.6, in turns, and print the ratios
	.venv/bin/python -m inference.bench.peers $(ARGS)

bench-rainbow: setup  ## train and score the rainbow recipe from nothing, three seeds; the last line is JSON
	.venv/bin/python -m training.bench.rainbow --out out/bench-rainbow $(ARGS)

bench-training: setup  ## measure training steps beside DALLE-pytorch 1.6.6, the loader and the start
	.venv/bin/python -m training.bench $(ARGS)

bench-costs: setup  ## measure `serve` of ROOT's model on two cores, and on a GPU where there is one: infra/reports/DATE_rainbow; 3 minutes
	.venv/bin/python -m infra.compare.report measure --root $(ROOT) $(ARGS)

image:  ## build the Docker image; BASE_IMAGE=NAME starts from another base
	container/build.sh $(IMAGE)

test-image: setup image check-template  ## test the image itself by docker run; container/with_docker.sh provides an engine
	DALLE_IMAGE=$(IMAGE) DALLE_REQUIRE_DOCKER=1 .venv/bin/python -m pytest -m docker $(ARGS)

local-train:  ## train the image on DATA=DIR as SageMaker does; ARGS="--set size=tiny --memory 4g"
	$(PYTHON) -m infra.local train --image $(IMAGE) --data $(DATA) --out $(OUT) $(ARGS)

local-serve:  ## serve what local-train packed, on PORT
	$(PYTHON) -m infra.local serve --image $(IMAGE) --model $(OUT)/model.tar.gz --port $(PORT) $(ARGS)

local-endpoint:  ## the same behind a stand-in for SageMaker's runtime, for boto3's own client; ARGS="--memory 4g --cpus 2"
	$(PYTHON) -m infra.local endpoint --image $(IMAGE) --model $(OUT)/model.tar.gz --port $(PORT) $(ARGS)

lock: $(UV)  ## compile requirements/*.txt again (newest versions: make lock UPGRADE=--upgrade)
	$(COMPILE) $(UPGRADE) --universal --all-extras -c requirements/pins.in pyproject.toml -o requirements/versions.txt
	$(COMPILE) --generate-hashes --universal --all-extras -c requirements/versions.txt pyproject.toml -o requirements/dev.txt
	$(COMPILE) --generate-hashes --python-platform x86_64-manylinux_2_28 --extra train --extra serve -c requirements/versions.txt pyproject.toml -o requirements/image.txt
	$(COMPILE) --generate-hashes --universal --extra infra -c requirements/versions.txt pyproject.toml -o requirements/infra.txt
	$(COMPILE) --generate-hashes --universal requirements/uv.in -o requirements/uv.txt
	$(COMPILE) $(UPGRADE) --generate-hashes --universal requirements/checkov.in -o requirements/checkov.txt
	$(COMPILE) $(UPGRADE) --generate-hashes --universal requirements/sdk2.in -o requirements/sdk2.txt

clean:  ## remove .venv, out/ and every cache
	rm -rf .venv out build *.egg-info container/dalle/decoding/cpu/*.so .mypy_cache .pytest_cache .ruff_cache && find . -name __pycache__ -prune -exec rm -rf {} +

$(UV): requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or later; name one: make setup PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --require-hashes -r requirements/uv.txt
	@touch $@

.venv/.stamp: $(UV) pyproject.toml requirements/dev.txt $(wildcard container/dalle/decoding/cpu/csrc/*)
	$(UV) pip sync --python .venv --require-hashes --build-constraints requirements/dev.txt --compile-bytecode requirements/uv.txt requirements/dev.txt
	rm -f container/dalle/decoding/cpu/_native*.so
	$(UV) pip install --python .venv --no-deps --no-build-isolation --editable .
	@touch $@
