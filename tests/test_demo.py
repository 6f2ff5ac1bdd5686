"The main job as a user types it: `scdd run digits`, from the installed console script."
import json, subprocess, sys, time
import pytest
from conftest import SCDD

FIGURES = ["distilled_soft", "distilled_hard", "random_soft", "random_hard", "full_data"]

def scdd(*words, **keywords): return subprocess.run([str(SCDD), *map(str, words)], capture_output=True, text=True, encoding="utf-8", **keywords)

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A run folder, and what the command said."
    folder = tmp_path_factory.mktemp("demo")/"digits"
    done = scdd("run", "digits", "--out", folder, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done

@pytest.fixture(scope="module")
def report(demo): return json.loads((demo[0]/"report.json").read_text(encoding="utf-8"))

@pytest.mark.timeout(2000)
def test_names_its_report(demo):
    folder, done = demo
    assert done.stdout.strip().splitlines()[-1] == f"report: {folder/'report.html'}"
    assert (folder/"report.html").stat().st_size > 10_000
    assert "Traceback" not in done.stderr

def test_report_is_whole(report):
    assert {"recipe", "commit", "device", "versions", "accuracy", "seconds", "bytes", "peak_memory_bytes"} <= set(report)
    assert report["recipe"]["name"] == "digits" and report["commit"] and report["device"] and report["versions"]["torch"]
    assert sorted(report["accuracy"]) == sorted(FIGURES)
    for figure in report["accuracy"].values(): assert figure["n"] == 1 and figure["std"] is None and 0 < figure["mean"] <= 1
    assert all(seconds >= 0 for seconds in report["seconds"].values()) and report["bytes"]["distilled images"] == 100 * 16 * 16 + 100 * 8

def test_accuracy_is_far_above_chance(report):
    floors = {"full_data": 0.95, "random_soft": 0.8, "random_hard": 0.8, "distilled_soft": 0.8, "distilled_hard": 0.5}
    found = {figure: report["accuracy"][figure]["mean"] for figure in floors}
    assert all(found[figure] > floor for figure, floor in floors.items()), found
    assert min(report["teachers"].values()) > 0.9, report["teachers"]

def test_memory_stays_small(report): assert report["peak_memory_bytes"] < 6e9

def test_images_are_there(demo):
    assert len(list((demo[0]/"recover").rglob("*.png"))) == 100
    assert len({path.parent.name for path in (demo[0]/"recover").rglob("*.png")}) == 10

def test_again_is_at_once(demo):
    folder, first = demo
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    began = time.monotonic(); again = scdd("run", "digits", "--out", folder, timeout=300); spent = time.monotonic() - began
    assert again.returncode == 0 and again.stdout.strip().splitlines()[-6:] == first.stdout.strip().splitlines()[-6:]
    assert {path: path.stat().st_mtime_ns for path in files} == files, "something was made again"
    print(f"again in {spent:.1f} s")

def test_show(demo):
    shown = scdd("show", demo[0], timeout=300)
    assert shown.returncode == 0 and "distilled, soft labels" in shown.stdout and "to do" not in shown.stdout

def test_other_settings_are_refused(demo):
    other = scdd("run", "digits", "--out", demo[0], "--recover.steps", 7, timeout=300)
    assert other.returncode == 2 and "--recover.steps" in other.stderr and len(other.stderr.strip().splitlines()) == 1
