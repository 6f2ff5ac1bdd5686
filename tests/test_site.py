"The finished site: what a reader with a phone, a screen reader or no network meets. Built once, with Sphinx; Quarto's side is checked by its structure."
import io, json, re, sys, time
from pathlib import Path
import pytest, yaml
from conftest import ROOT
from scdd import pages, site
from scdd.files import write_json

NOTEBOOKS = [path.relative_to(ROOT/"nbs").with_suffix("").as_posix() for path in site.notebooks()]

@pytest.fixture(scope="module", autouse=True)
def not_the_command_line():
    "python -m pytest would be taken for python -m scdd by chapter 11's last module."
    with pytest.MonkeyPatch.context() as patch: patch.setattr(sys, "argv", ["site"]); yield

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The site, and the seconds that building it took."
    out, began = tmp_path_factory.mktemp("site")/"docs", time.monotonic()
    site.sphinx(out)                                             # a warning and a dead link are errors there
    print(f"the site: {len(NOTEBOOKS)} pages in {time.monotonic() - began:.0f} s")
    return out

@pytest.fixture(scope="module")
def found(built): return {path.relative_to(built).as_posix(): page for path, page in pages.read_pages(built).items()}

# --- pages as files

@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_page(built, found, name):
    page, file = found[f"nbs/{name}.html"], built/"nbs"/f"{name}.html"
    assert not pages.out_of_order(page.headings), page.headings
    assert all(alt.strip() for alt in page.pictures), "a picture without alternative text"
    assert file.stat().st_size < 1_500_000
    assert (built/"notebooks"/f"{name}.ipynb").read_bytes() == (ROOT/"nbs"/f"{name}.ipynb").read_bytes(), "the notebook to download is not this page's"

def test_every_figure_is_on_its_page(found):
    for path in site.notebooks():
        drawn = sum(bool(pages.alt_text(cell)) and cell["id"] in pages.figure_numbers() for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code")
        assert len(found[f"nbs/{path.relative_to(ROOT/'nbs').with_suffix('').as_posix()}.html"].pictures) >= drawn

def test_nothing_comes_from_a_network(built):
    assert not pages.from_network(pages.read_pages(built))
    for style in built.rglob("*.css"): assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name

def test_no_dead_links(built): assert not pages.dead_links(pages.read_pages(built))

def test_a_dead_link_is_found(tmp_path):
    (tmp_path/"a.html").write_text('<h1 id="top">a</h1><a href="b.html#here">b</a><a href="b.html#there">b</a><a href="c.html">c</a>')
    (tmp_path/"b.html").write_text('<h1 id="here">b</h1>')
    assert pages.dead_links(pages.read_pages(tmp_path)) == ["a.html: b.html#there: there is no such place in the page", "a.html: c.html: there is no such file"]

def test_llms_txt_names_every_page(built):
    text = (built/"llms.txt").read_text(encoding="utf-8")
    for name in NOTEBOOKS: assert f"/nbs/{name}.html)" in text

# --- Quarto, which cannot be run everywhere

def test_quarto_renders_every_notebook():
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    globs = [path.relative_to(ROOT).as_posix() for pattern in config["project"]["render"] for path in ROOT.glob(pattern)]
    assert {f"nbs/{name}.ipynb" for name in NOTEBOOKS} <= set(globs)
    assert config["ipynb-filters"] == ["python -m scdd.site filter"] and config["execute"] == {"enabled": False}
    assert (ROOT/config["bibliography"]).is_file() and (ROOT/config["format"]["html"]["css"]).is_file()
    assert set(config["format"]["html"]["theme"]) == {"light", "dark"} and config["website"]["repo-actions"] == ["edit", "issue"]

def test_quarto_filter_gives_a_notebook(monkeypatch, capsys):
    text = (ROOT/"nbs/pipeline/06_bn.ipynb").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text)); pages.filter_notebook()
    made = json.loads(capsys.readouterr().out); words = "\n".join("".join(cell["source"]) for cell in made["cells"])
    assert "fig-alt" in words and "::: {.cost}" in words and "Open in Colab" in words and "Figure 6.1" in words

def test_citations_have_an_entry():
    known = set(re.findall(r"^@\w+\{([\w:-]+),", (ROOT/"nbs/references.bib").read_text(encoding="utf-8"), re.M))
    for path in site.notebooks():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "markdown": continue
            cited = re.findall(r"@([\w:-]+)", " ".join(re.findall(pages.CITED, re.sub(pages.CODE, "", "".join(cell["source"])))))
            assert set(cited) <= known, f"{path.name}: {set(cited) - known}"

@pytest.mark.parametrize("path", site.notebooks(), ids=lambda path: path.stem)
def test_equations_are_numbered_in_order(path):
    "No number twice, and each above the one before, all of this chapter."
    prose = [re.sub(pages.CODE, "", "".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown"]
    numbers = [tuple(map(int, found.split("."))) for text in prose for found in pages.TAGGED.findall(text)]
    assert numbers == sorted(set(numbers)) and {str(first) for first, _ in numbers} <= {pages.chapter(path)}, numbers

# --- in a browser

@pytest.fixture(scope="module")
def browser(chromium):
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, headless=True, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--allow-file-access-from-files"])
        yield opened
        opened.close()

@pytest.fixture(scope="module")
def axe(): return (Path(pytest.importorskip("axe_playwright_python").__file__).parent/"axe.min.js").read_text(encoding="utf-8")

PLAIN = "document.querySelectorAll('.highlight pre, mjx-container').forEach(one => one.textContent = one.textContent)"   # thousands of coloured words, the same on every page
CHECKS = {"everything": "{resultTypes: ['violations']}", "colours": "{runOnly: ['color-contrast'], resultTypes: ['violations']}"}

def violations(page, checks):
    "What axe-core holds to be serious."
    found = page.evaluate(f"axe.run({{include: [document], exclude: [['mjx-container']]}}, {CHECKS[checks]})")["violations"]
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:150]}" for one in found if one["impact"] in ("serious", "critical")]

@pytest.mark.parametrize("name", NOTEBOOKS)
def test_everybody_can_read_it(browser, axe, built, name):
    "axe-core finds nothing serious, in light and in dark; on a phone nothing scrolls sideways; nothing is asked of a network."
    page, asked, complaints = browser.new_page(viewport={"width": 375, "height": 800}, color_scheme="light"), [], []
    page.on("request", lambda request: asked.append(request.url)); page.on("pageerror", lambda error: complaints.append(str(error)))
    began = time.monotonic(); page.goto((built/"nbs"/f"{name}.html").as_uri(), wait_until="load"); seconds = time.monotonic() - began
    page.evaluate("window.MathJax?.startup?.promise?.then(() => true)")                                   # formulas are wider than their text
    wide = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 1280, "height": 900}); page.evaluate(axe); page.evaluate(PLAIN)
    bad = violations(page, "everything")
    page.emulate_media(color_scheme="dark"); bad += violations(page, "colours")
    page.close()
    assert not bad, bad
    assert wide <= 375, f"the page is {wide} pixels wide on a phone"
    assert not complaints and all(url.startswith(("file:", "data:", "blob:")) for url in asked), (complaints, asked)
    print(f"{name}: open in {seconds:.2f} s")

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_code(browser, axe, built, scheme):
    page = browser.new_page(color_scheme=scheme); page.goto((built/"nbs/pipeline/00_files.html").as_uri()); page.evaluate(axe)
    bad = violations(page, "colours"); page.close()
    assert not bad, bad

def test_search_works_from_a_file(browser, built):
    page = browser.new_page(); page.goto((built/"search.html").as_uri() + "?q=BatchNorm")
    page.wait_for_selector("#search-results li", timeout=20_000)
    assert page.locator("#search-results li").count() > 3
    page.close()

def test_tables_are_tables(built):
    "A table that a cell made in Markdown is one on the page, too."
    raw = [path.relative_to(built).as_posix() for path in built.rglob("*.html") if re.search(r"<p>\s*\|", path.read_text(encoding="utf-8"))]
    assert not raw, f"rows of a table as a paragraph: {raw}"

def test_a_run_that_stood_still_has_no_minutes(quick_run, tmp_path, monkeypatch):
    for folder in ("nbs/experiments/results", "nbs/_static"): (tmp_path/folder).mkdir(parents=True)
    monkeypatch.setattr(site, "root", lambda: tmp_path)
    site.keep(quick_run, "one"); site.keep(quick_run, "two", "paused")
    kept = {name: json.loads((tmp_path/f"nbs/experiments/results/{name}.json").read_text()) for name in ("one", "two")}
    assert kept["one"]["accuracy"] == kept["two"]["accuracy"] and "code" in kept["one"] and "curves" not in kept["one"]
    def minutes(): return [row.split(" | ")[12] for row in site.results_table().splitlines()[2:]]
    assert minutes() == ["–"]                                                                    # two files of one run are one row
    (tmp_path/"nbs/experiments/results/two.json").unlink()
    assert float(minutes()[0]) >= 0

def test_the_front_page_has_a_row_for_each_kind_of_run():
    "Single runs, cells of a sweep, the full size and the search, each with its own recipe, and no run twice."
    table = [row.strip("| ").split(" | ") for row in site.results_table().splitlines()]
    rows = table[2:]; assert {len(row) for row in rows} == {len(table[0])} and len({tuple(row[:12]) for row in rows}) == len(rows)
    def found(**wanted): return [row for row in rows if all(row[table[0].index(name.replace("_", " "))] == value for name, value in wanted.items())]
    assert found(data="cifar100", IPC="1") and found(data="cifar100", IPC="50", network="resnet18 × 64")
    assert {row[4] for row in found(data="cifar100 (10 classes), held out")} == {"supervised"} and found(data="tiny-imagenet (10 classes)")

def test_every_result_says_where_it_is_from():
    "A command (or what a script did), a commit and a day."
    for path in (site.root()/"nbs"/"experiments"/"results").glob("*.json"):
        found = json.loads(path.read_text())
        assert "code" not in found or (found.get("command") or found.get("what")) and found["commit"] and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]), path.name

def test_results_tell_age_and_the_modules_that_changed_since(tmp_path, monkeypatch):
    kept = tmp_path/"nbs/experiments/results"; kept.mkdir(parents=True)
    now = site.module_hashes("scdd.bn"); today = time.strftime("%Y-%m-%d")
    write_json(kept/"same.json", {"command": "scdd run one", "commit": "abc", "date": today, "code": now})
    write_json(kept/"other.json", {"command": "scdd run two", "commit": "abc", "date": "2026-01-01", "code": now | {"scdd.models": "00000000"}})
    monkeypatch.setattr(site, "root", lambda: tmp_path)
    other, same = site.results().split("same\n")
    assert same.endswith(f"commit abc, {today}, 0 days ago; from the code as it stands") and "days ago; changed since: models\n" in other and "scdd run two" in other

def test_new_results_are_shown(monkeypatch):
    "What a notebook shows of kept results is not held against new ones; what shows none is left alone."
    def notebook(source): return {"cells": [{"cell_type": "code", "id": "a", "source": [source]}], "metadata": {}}
    for source, new, held in (("show(results_table())", True, set()), ("show(results_table())", False, {"a"}), ("1 + 1", True, {"a"})):
        before = notebook(source); before["metadata"]["scdd"] = {"code": site.stamp(before)}
        monkeypatch.setattr(site, "new_results", lambda: new)
        assert site.unchanged(notebook(source), before) == held

def test_a_stamp_follows_every_manner_of_import(monkeypatch):
    asked = []; monkeypatch.setattr(site, "code_hash", lambda *names: asked.append(set(names)) or "x")
    site.stamp({"cells": [{"cell_type": "code", "source": ["from scdd import data, plot as drawing  # two\n", "from scdd.bn import moments\n", "import scdd.models\n", "    from scdd import align; align\n"]}]})
    assert asked == [{"scdd.data", "scdd.plot", "scdd.bn", "scdd.models", "scdd.align"}]
