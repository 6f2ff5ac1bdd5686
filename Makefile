# make demo | make test | make lab | make docs | make class | make slides | make notebooks | make results | make comparison | make clean
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2
BIN     = $(VENV)/bin
# Debian's names of what pip cannot bring: venv, a compiler and Python.h for torch.compile, a browser for the tests
HEADERS = $(PYTHON) -c "import sysconfig, pathlib, sys; sys.exit(not (pathlib.Path(sysconfig.get_paths()['include'])/'Python.h').exists())"
define system
@missing=""; \
$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || missing="$$missing python3-venv"; \
command -v g++ >/dev/null 2>&1 || missing="$$missing g++"; \
$(HEADERS) 2>/dev/null || missing="$$missing python3-dev"; \
for program in $(1); do command -v $$program >/dev/null 2>&1 || missing="$$missing $$program"; done; \
if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
  echo "installing$$missing"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null || exit 1; \
elif [ -n "$$missing" ]; then echo "not on this machine:$$missing (as root: apt-get install$$missing); going on without"; fi
endef

.PHONY: demo test lab docs class slides notebooks results comparison clean
demo: $(VENV)/run
	$(BIN)/scdd run digits

# in two processes of one thread each (or WORKERS=4; PYTEST="-k 06_bn -n 0" for some of them in one process)
test: $(VENV)/dev
	$(BIN)/python -m pytest tests -n $(WORKERS) $(PYTEST)

lab: $(VENV)/dev
	$(BIN)/jupyter lab nbs

docs: $(VENV)/dev
	$(BIN)/python -m scdd.site docs

# editions for a class (or CHAPTERS="06_bn …"): student, solution and instructor, in _class/
class: $(VENV)/dev
	$(BIN)/python -m scdd.editions make $(CHAPTERS)

# a deck for each part of the book (or PARTS="pipeline …") in _class/slides/
slides: $(VENV)/dev
	$(BIN)/python -m scdd.editions slides $(PARTS)

# run every notebook (or NB="nbs/pipeline/01_data.ipynb …"), store its outputs, export the package, write README.md
notebooks: $(VENV)/dev
	$(BIN)/python -m scdd.site execute $(NB)

# each kept figure with its command and its day, and which modules have changed since
results: $(VENV)/dev
	@$(BIN)/python -m scdd.site results

# every method on ten classes of CIFAR-100 (DATA=the folder that holds cifar100), 1 and 10 images per class, for ConvNets with
# hard labels as in DC's protocol; then other students for four of them (SC-DD is the first), under hard labels alone. Hours on two cores; the same command goes on
CONVNET = --student.name convnet --student.width 32 --student.norm instance
JUDGED = --train.sets each --hard.sets each --hard.epochs 300 --hard.batch 256 --hard.crop none --hard.flip False
comparison: $(VENV)/run
	@test -n "$(DATA)" || { echo "make comparison: give DATA=FOLDER, the folder that holds cifar100"; exit 1; }
	$(BIN)/scdd compare cifar100-mini $(CONVNET) $(JUDGED) --recover.ipc 1 --data $(DATA) --out runs/compare-ipc1
	$(BIN)/scdd compare cifar100-mini $(CONVNET) $(JUDGED) --recover.ipc 10 --data $(DATA) --out runs/compare-ipc10 --reuse runs/compare-ipc1/scdd
	for student in resnet18 vgg11_bn vit; do $(BIN)/scdd compare cifar100-mini --student.name $$student $(JUDGED) --recover.ipc 10 --data $(DATA) \
	  --methods dm mtt sre2l --train.students 1 --train.epochs 1 --out runs/compare-$$student --reuse runs/compare-ipc10/*/ || exit; done

$(VENV)/run: settings.ini setup.py pyproject.toml
	$(call system,)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the package (torch is large: the first time takes some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/dev: $(VENV)/run
	$(call system,chromium)
	@echo "installing what the notebooks, the tests and the site need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

# submissions and grades of a class are nobody's to delete
clean:
	test -d _class/submitted || rm -rf _class
	rm -rf $(VENV) _docs _proc runs build dist *.egg-info .pytest_cache
