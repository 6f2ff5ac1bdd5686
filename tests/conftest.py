"Where the tests find the repository, the data and a browser; how they are shared among processes; and what the run did not do, named at its end."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest

# Before anything imports torch, and for the kernels and commands that tests start:
os.environ.setdefault("SCDD_PRECISION", "float32")   # else each processor takes what is faster on it, and tests that compare figures would depend on it
os.environ.setdefault("OMP_NUM_THREADS", "1")        # two processes share the cores: with two threads each they would wait for one another

ROOT = Path(__file__).resolve().parents[1]
SCDD = Path(sys.executable).with_name("scdd.exe" if os.name == "nt" else "scdd")   # the installed console script
NOT_RUN = []                                   # (notebook, which cell)
SECONDS = {}                                   # notebook -> seconds

@pytest.fixture(scope="session")
def root(): return ROOT

@pytest.fixture(scope="session")
def data_root():
    "The folder of real data sets, where this machine has one."
    if not os.environ.get("SCDD_DATA"): pytest.skip("SCDD_DATA is not set: no photographs on this machine")
    return Path(os.environ["SCDD_DATA"])

@pytest.fixture(scope="session")
def chromium():
    "A browser's path."
    path = next((shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    if path is None: pytest.skip("no Chromium on this machine")
    return path

QUICK = {"pretrain.epochs": 2, "supervised.epochs": 2, "full.epochs": 2, "align.epochs": 2, "recover.steps": 5, "recover.ipc": 1, "train.epochs": 2, "hard.epochs": 2}

@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    "A run folder of the digits recipe, made by the command line in seconds; its figures mean nothing."
    folder = tmp_path_factory.mktemp("quick")/"digits"
    values = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([str(SCDD), "run", "digits", "--out", str(folder), *values], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder

# Each file goes to one process, so that its fixtures are made once, and each notebook by itself. Three files share one process,
# since they use a browser and measure how soon a page reacts, or build the site in one folder.
FIRST = ["test_browser", "test_site", "test_editions", "test_demo", "test_run", "test_processes", "test_notebooks"]
IN_A_BROWSER = FIRST[:3]

def pytest_collection_modifyitems(items):
    "What takes long comes first."
    lessons = json.loads((ROOT/"nbs/experiments/results/lessons.json").read_text(encoding="utf-8"))["seconds"]
    def order(item):
        file = item.path.stem
        if file != "test_notebooks": return FIRST.index(file) if file in FIRST else len(FIRST), 0
        return (FIRST.index(file), -lessons.get(item.callspec.id, 60)) if item.originalname == "test_runs" else (len(FIRST) + 1, 0)
    items.sort(key=order)

@pytest.hookimpl(optionalhook=True)   # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    "Which tests stay together. (Marks of groups, with --dist loadgroup, do nothing in xdist 3.8 under pytest 9.2.)"
    from xdist.scheduler import LoadScopeScheduling
    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = Path(nodeid.split("::")[0]).stem
            return nodeid if file == "test_notebooks" else "browser" if file in IN_A_BROWSER else file
    config.option.loadscopereorder = False
    return Together(config, log)

def pytest_runtest_logreport(report):
    "What a test of a notebook has noted, also one that ran in another process."
    if report.when != "call": return
    for name, value in report.user_properties:
        if name == "seconds": SECONDS.update([value])
        if name == "not run": NOT_RUN.append(value)

def pytest_addoption(parser):
    parser.addoption("--record-seconds", action="store_true", help="keep how long each notebook took, for the site")

def record_seconds():
    "Keep the seconds of this run beside those of notebooks that it left out."
    from scdd.files import read_json, write_json
    from scdd.train import provenance
    path = ROOT/"nbs"/"experiments"/"results"/"lessons.json"
    before = read_json(path)["seconds"] if path.is_file() else {}
    write_json(path, {"about": "seconds of each notebook from top to bottom, as the tests ran it", "seconds": before | {name: round(seconds, 1) for name, seconds in SECONDS.items()}, **provenance()})

def pytest_terminal_summary(terminalreporter):
    write = terminalreporter.write_line
    if SECONDS and terminalreporter.config.getoption("--record-seconds"): record_seconds()
    if SECONDS:
        terminalreporter.section("notebooks")
        for name, seconds in sorted(SECONDS.items()): write(f"{name:<24} {seconds:6.1f} s")
        write(f"{'all':<24} {sum(SECONDS.values()):6.1f} s")
    for name, line in sorted(map(tuple, NOT_RUN)): write(f"not run in {name}: {line}")
    if SECONDS: write(f"cells not run: {len(NOT_RUN)}")
