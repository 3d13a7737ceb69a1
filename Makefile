# `make` lists the targets. Everything runs in .venv, from the versions and hashes in requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3
export DO_NOT_TRACK ?= true
unexport PYTHONDONTWRITEBYTECODE  # else each process compiles TensorFlow anew: 8 s of CPU

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast sweep check docs browser pictures bench bench-data bench-training bench-levers \
	bench-serving bench-full-size bench-feedback bench-drift bench-soak bench-scale lock deploy up down image containers

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

demo: .venv/installed  ## retrain on drawn images: no credentials, no server, no GPU; under 5 minutes
	@PREFECT_PROFILE=ephemeral $(BIN)/python -m flows.retrain --sample

test: .venv/installed  ## run the whole test suite but the sweeps
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not sweep"

sweep: .venv/installed  ## run the tests that take long, such as many kills of a retrain; FILES=... limits them
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m sweep $(FILES)

test-fast: .venv/installed  ## run the tests that take a moment and start no process: for the edit loop
	$(BIN)/python -m pytest -n 0 -m "not slow and not process and not browser and not sweep" --durations 3 \
		$(addprefix --ignore=tests/test_,flows.py first_screen.py stack.py containers.py deployments.py docs.py)

check: .venv/installed  ## check format, lint, types, import rules, and that the lock fits pyproject.toml
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cp requirements.lock .venv/fresh.lock && cp deployments/gpu.lock .venv/fresh-gpu.lock
	$(LOCK) --all-extras --output-file .venv/fresh.lock
	$(LOCK) $(IMAGE_EXTRAS) --output-file .venv/fresh-gpu.lock
	diff requirements.lock .venv/fresh.lock && diff deployments/gpu.lock .venv/fresh-gpu.lock || \
		(echo "The locks do not fit pyproject.toml: run make lock"; exit 1)

docs: .venv/installed  ## build the documentation into site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

browser:  ## install Debian's chromium, in which the page is tested; without it that test is skipped
	command -v chromium || (apt-get update -q && apt-get install -qy --no-install-recommends chromium)

pictures: .venv/installed browser  ## take the pictures of Prefect's and MLflow's pages anew, by the test in a browser
	PICTURES=docs/pictures $(BIN)/python -m pytest -n 0 tests/test_stack.py

bench: .venv/installed  ## measure a whole retrain: make bench ARCHIVES=folder of the three zips
	$(BIN)/python benchmarks/retrain.py $(ARCHIVES)
	$(BIN)/python benchmarks/render.py

bench-data: .venv/installed  ## measure near copies and the speed of preparing data: make bench-data ARCHIVES=folder
	$(BIN)/python benchmarks/near_copies.py $(ARCHIVES)
	$(BIN)/python benchmarks/data_speed.py $(ARCHIVES)
	$(BIN)/python benchmarks/render.py

bench-scale: .venv/installed  ## measure near copies, splits and manifest of simulated millions of rows: an hour
	PYTHONPATH=. $(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/render.py

bench-full-size: .venv/installed  ## prepare and train at full size, an hour: make bench-full-size ARCHIVES=folder
	PYTHONPATH=. $(BIN)/python benchmarks/full_size.py $(ARCHIVES)
	$(BIN)/python benchmarks/render.py

bench-training: .venv/installed  ## measure candidates and training speed, hours: make bench-training ARCHIVES=folder
	$(BIN)/python benchmarks/training_speed.py $(ARCHIVES)
	$(BIN)/python benchmarks/candidates.py $(ARCHIVES)
	$(BIN)/python benchmarks/render.py

bench-levers: .venv/installed  ## measure what could help the default candidate, hours: make bench-levers ARCHIVES=folder
	PYTHONPATH=. $(BIN)/python benchmarks/levers.py $(ARCHIVES)
	$(BIN)/python benchmarks/render.py

bench-serving: .venv/installed  ## measure face detection and how fast predict answers: make bench-serving ARCHIVES=folder
	$(BIN)/python benchmarks/face_detection.py $(ARCHIVES)
	$(BIN)/python benchmarks/serving_speed.py $(ARCHIVES)
	$(BIN)/python benchmarks/render.py

bench-feedback: .venv/installed  ## measure what confirmed reports change: make bench-feedback ARCHIVES=folder
	$(BIN)/python benchmarks/feedback.py $(ARCHIVES)
	$(BIN)/python benchmarks/render.py

bench-drift: .venv/installed  ## measure how often drift alarms: make bench-drift ARCHIVES=folder
	PYTHONPATH=. $(BIN)/python benchmarks/drift.py $(ARCHIVES)
	$(BIN)/python benchmarks/render.py

bench-soak: .venv/installed  ## watch memory, files and threads of what runs for long: over an hour
	PYTHONPATH=. $(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/render.py

lock: .venv/installed  ## write requirements.lock, and the image's deployments/gpu.lock, anew from pyproject.toml
	$(LOCK) --all-extras --output-file requirements.lock
	$(LOCK) $(IMAGE_EXTRAS) --output-file deployments/gpu.lock

deploy: .venv/installed  ## create work pools, deployments and alerts on the Prefect server at PREFECT_API_URL
	$(BIN)/python deployments/deploy.py

up: .venv/installed  ## start Prefect, MLflow and both workers on loopback, and apply the deployments
	@$(BIN)/python deployments/stack.py up

down:  ## end what make up started
	@$(BIN)/python deployments/stack.py down

image:  ## build the container image of all parts; IMAGE=registry/name:tag gives it another name
	docker build --file deployments/Dockerfile --tag $(IMAGE) \
		--build-arg GIT_COMMIT=$$(git describe --always --dirty --abbrev=40 --exclude='*') .

containers: image  ## start what make up starts in containers, on PostgreSQL; POSTGRES_PASSWORD must be set
	docker compose --env-file deployments/stack.env --file deployments/compose.yaml up --detach

IMAGE ?= $(shell sed -n 's/^IMAGE=//p' deployments/stack.env)
LOCK = $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	pyproject.toml
IMAGE_EXTRAS = --extra train --extra flows --extra remote --extra cluster --group cuda --constraint requirements.lock

# uv comes from the lock too, by pip with its hashes; then uv installs the rest.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit("Python 3.11, 3.12 or 3.13 \
	is needed (TensorFlow has no wheel for others). Received: %d.%d. Try: make demo PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv
	awk '/^uv==/ {on = 1} on {print} on && !/\\$$/ {exit}' requirements.lock > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r .venv/uv.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@
