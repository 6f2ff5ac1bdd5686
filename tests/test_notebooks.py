"Every notebook runs from top to bottom in a real kernel, is clean, and is what the package and the README come from."
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT
from scdd import editions, site

NOTEBOOKS = site.notebooks()
name = lambda path: path.stem
read = lambda path: json.loads(path.read_text(encoding="utf-8"))
first_line = lambda cell: next((line for line in "".join(cell["source"]).splitlines() if line.strip() and not line.startswith("#|")), "")[:70]

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_runs(path, record_property):
    for cell in read(path)["cells"]:
        if not site.runs(cell) and "nbdev.nbdev_export(" not in "".join(cell["source"]): record_property("not run", (path.stem, first_line(cell)))
    done, seconds, verdicts = editions.checked(path, timeout=900)
    record_property("seconds", (path.stem, seconds))
    for cell in done.cells:                                         # a guarded cell says itself that its data are not here
        for output in cell.get("outputs", []):
            for line in output.get("text", "").splitlines():
                if line.startswith("not run:"): record_property("not run", (path.stem, line))
    for number, unfilled, solved in verdicts:
        assert unfilled.startswith("not yet:"), f"exercise {number}: with its stub the check says {unfilled!r}"
        assert solved.startswith("right:"), f"exercise {number}: with its solution the check says {solved!r}"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_is_clean(path):
    from nbdev.clean import clean_nb
    from execnb.nbio import dict2nb, nb2dict
    notebook = read(path)
    assert path.stat().st_size < 1_000_000, "over 1 MB"
    assert "widgets" not in notebook["metadata"], "stored widget state, which GitHub does not render"
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"a stored error: {output['ename']}"
            if "image/png" in output.get("data", {}):
                assert len(output["metadata"].get("image/png", {}).get("alt", "").strip()) > 20, f"a figure without alternative text: {first_line(cell)}"
        if cell["cell_type"] == "markdown":
            assert not re.search(r"!\[\s*\]\(|<img(?![^>]*alt=)", "".join(cell["source"])), "an image without alternative text"
            assert not re.search(r"[\x07-\x09\x0b-\x0d]", "".join(cell["source"])), "a backslash that became a control character, as in \\rho or \\frac"
    cleaned = dict2nb(json.loads(json.dumps(notebook))); clean_nb(cleaned, allowed_metadata_keys=["scdd"], clean_ids=False)   # as settings.ini has it
    assert json.loads(json.dumps(nb2dict(cleaned))) == notebook, "nbdev_clean would change it"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_are_from_this_code(path):
    notebook = read(path)
    assert notebook["metadata"].get("scdd", {}).get("code") == site.stamp(notebook), "stored outputs are from older code: make notebooks"

def test_export_is_current(tmp_path):
    for part in ("nbs", "scdd", "settings.ini"):
        if (ROOT/part).is_dir(): shutil.copytree(ROOT/part, tmp_path/part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))   # which come and go beside this test
        else: shutil.copy(ROOT/part, tmp_path/part)
    for file in (tmp_path/"scdd").rglob("*.py"): file.unlink()
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, check=True, env={name: value for name, value in os.environ.items() if name != "IN_TEST"})   # which nbdev leaves behind in another test
    files = lambda root: {p.relative_to(root).as_posix(): p.read_text() for p in (root/"scdd").rglob("*.py")}
    assert files(ROOT) == files(tmp_path)

def test_readme_is_the_index(monkeypatch):
    before, written = (ROOT/"README.md").read_text(encoding="utf-8"), {}
    monkeypatch.setattr(Path, "write_text", lambda path, text, **options: written.update({path: text}))   # others read the file meanwhile
    site.readme(); assert written == {ROOT/"README.md": before}

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_page_has_one_title(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["site"])      # not python -m pytest, which chapter 11's last module would take for python -m scdd
    headings = [line for cell in site.plain(path, []).cells if cell.cell_type == "markdown" for line in re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S).splitlines() if line.startswith("# ")]
    assert len(headings) == 1

def test_sidebar_lists_every_page(): site.check_sidebar()
