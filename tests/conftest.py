"Where the tests find the repository, the data and a browser; and what the run did not do, named at its end."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCDD = Path(sys.executable).with_name("scdd.exe" if os.name == "nt" else "scdd")   # the installed console script
NOT_RUN = []                                   # (notebook, number of cells, why)
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
        for name, seconds in SECONDS.items(): write(f"{name:<24} {seconds:6.1f} s")
        write(f"{'all':<24} {sum(SECONDS.values()):6.1f} s")
    for name, line in NOT_RUN: write(f"not run in {name}: {line}")
    if SECONDS: write(f"cells not run: {len(NOT_RUN)}")
