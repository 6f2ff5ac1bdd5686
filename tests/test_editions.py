"Exercises are read and refused; a class is released, handed in and graded; slides show in a browser without a network."
import json, subprocess, sys
import pytest
from conftest import ROOT
from scdd import editions
from scdd.files import UserError

QUESTION = ("markdown", "### Exercise 1. A mean\n\nDefine `mean(numbers)`. See [another chapter](../pipeline/01_data.ipynb#data).")
STUB = ("code", "#| exercise: 1\ndef mean(numbers): ...   # your answer")
CHECK = ("code", "#| check: 1\ndef check_mean():\n    'mean(numbers) is their mean'\n    assert mean([1, 2, 6]) != 9, 'that is the sum'\n    assert mean([1, 2, 6]) == 3, 'the mean of 1, 2 and 6 is 3'\nattempt(check_mean)")
SOLUTION = ("markdown", "<details><summary>Solution</summary>\n\n```python\ndef mean(numbers): return total(numbers) / len(numbers)\n```\n\nIt has a reason.\n</details>\n\n## Recap")
CELLS = {"front": ("raw", "---\ntitle: A mean\n---"), "title": ("markdown", "# A mean"), "import": ("code", "#| export\nfrom scdd.classroom import attempt"),
         "total": ("code", "def total(numbers): return sum(numbers, start)"), "slow": ("code", "raise SystemError('too slow for a grader')"), "start": ("code", "start = 0"),
         "question": QUESTION, "stub": STUB, "check": CHECK, "solution": SOLUTION}

@pytest.fixture
def write(tmp_path):
    "Writes a notebook of (kind, text) pairs and gives its path."
    def one(cells, name="1_mean"):
        made = [dict(cell_type=kind, id=id, metadata={}, source=text.splitlines(keepends=True)) | (dict(outputs=[], execution_count=None) if kind == "code" else {}) for id, (kind, text) in cells.items()]
        path = tmp_path/f"{name}.ipynb"; path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)), encoding="utf-8")
        return path
    return one

def test_exercises_are_read(write):
    one, = editions.exercises(write(CELLS))
    assert (one.number, one.question["id"], one.stub["id"], one.check["id"]) == (1, "question", "stub", "check")
    assert one.solution.startswith("def mean") and one.text == "It has a reason."

def test_a_solution_and_the_next_question_may_share_a_cell(write):
    shared = ("markdown", SOLUTION[1] + "\n\n" + QUESTION[1].replace("1.", "2."))
    cells = CELLS | {"solution": shared, "stub2": (STUB[0], STUB[1].replace(": 1", ": 2")), "check2": (CHECK[0], CHECK[1].replace("check: 1", "check: 2")), "solution2": SOLUTION}
    assert [(one.number, one.question["id"]) for one in editions.exercises(write(cells))] == [(1, "question"), (2, "solution")]

@pytest.mark.parametrize("part", ["question", "stub", "check", "solution"])
def test_a_missing_part_is_named(write, part):
    with pytest.raises(UserError, match=rf"1_mean.ipynb, exercise 1: there is no {part}"): editions.exercises(write({name: cell for name, cell in CELLS.items() if name != part}))
    with pytest.raises(UserError, match="is there 2 times"): editions.exercises(write(CELLS | {"again": CELLS[part]}))

@pytest.mark.parametrize("cell, instead, complaint", [("solution", "<details><summary>Solution</summary>\nthink\n</details>", "```python"), ("check", "#| check: 1\nassert True", "attempt")])
def test_a_useless_part_is_named(write, cell, instead, complaint):
    with pytest.raises(UserError, match=complaint): editions.exercises(write(CELLS | {cell: (CELLS[cell][0], instead)}))

def test_a_chapter_that_does_not_exist():
    with pytest.raises(UserError, match="did you mean '06_bn'"): editions.chapters(["06_nb"])
    with pytest.raises(UserError, match="did you mean 'peers'"): editions.show_slides("pears")

@pytest.mark.parametrize("code, given, used", [
    ("import torch.nn as nn, numpy", {"nn", "numpy"}, set()),
    ("for row in rows: total += row", {"row", "total"}, {"rows"}),
    ("network.train()", {"network"}, {"network"}),
    ("calibrate(network, 3)", {"network"}, {"calibrate", "network"}),
    ("rows[3].name = 1", {"rows"}, {"rows"}),
    ("print(len(rows))", set(), {"print", "len", "rows"}),
    ("def half(x):\n    y = x / divisor\n    return y", {"half"}, {"divisor"}),
    ("found = [x * scale for x in rows if (last := x)]", {"found", "last"}, {"rows", "scale"})])
def test_what_a_cell_gives_and_uses(code, given, used):
    found = editions.names(code)
    assert found[0] == given and used <= found[1] and not {"x", "y"} & set.union(*found)

IMPORTS = "import sys, torch, numpy as np, torch.nn.functional as F\nfrom torch import nn\nfrom os import environ\nimport json as rows\nrows = [1]"

def test_modules_are_told_from_other_imports():
    before = set(sys.modules)
    assert editions.modules([IMPORTS, "from sphinx import addnodes"]) == {"sys": "sys", "torch": "torch", "np": "numpy", "F": "torch.nn.functional", "nn": "torch.nn", "addnodes": "sphinx.addnodes"}
    assert set(sys.modules) - before <= {"torch", "numpy"}, "something was imported to find out"

@pytest.mark.parametrize("code, given", [
    ("torch.testing.assert_close(found, wanted)", set()), ("np.testing.assert_allclose(found, 3)", set()),             # assertions change nothing
    ("torch.save(found, folder/'a.pth')", {"found", "folder"}), ("nn.init.zeros_(layer.weight)", {"layer"}), ("F.relu_(maps)", {"maps"}),
    ("torch.manual_seed(0)", {"torch"}), ("np.random.seed(0)", {"np"}), ("torch.set_num_threads(1)", {"torch"}), ("torch.backends.mkldnn.enabled = False", {"torch"}),
    ("sys.path.append('a')", {"sys"}), ("environ.update(a='b')", {"environ"}), ("rows.append(3)", {"rows"})])        # a list in a module, an import that is no module, a name bound again
def test_functions_of_modules_leave_them_as_they_are(code, given): assert editions.names(code, editions.modules([IMPORTS]))[0] == given

@pytest.mark.parametrize("code, used", [
    ("drawn, axis = figure()\nshow(drawn, axis)", {"figure", "show"}), ("for row in rows: total = row\nprint(total)", {"rows", "print"}), ("total = total + 1", {"total"}), ("total += 1; print(total)", {"total", "print"}),
    ("scale = 2\ndef twice(x): return scale * x", {"scale"}), ("scale = 2; twice = lambda x: scale * x", {"scale"}), ("if some: total = 1\nprint(total)", {"some", "print", "total"})])   # called later, or bound perhaps
def test_what_a_cell_binds_itself_is_of_no_use_from_elsewhere(code, used): assert editions.names(code)[1] == used

def test_attempt_needs_nothing_large():
    code = "import sys\nfor name in ('nbgrader', 'nbconvert', 'nbformat', 'nbclient', 'nbdev', 'sphinx', 'torch', 'numpy'): sys.modules[name] = None\nfrom scdd.classroom import attempt"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

def test_editions_are_not_committed():
    assert "_class/" in (ROOT/".gitignore").read_text().splitlines()

@pytest.mark.parametrize("kind", ["instructor", "solution"])
def test_editions(write, kind):
    notebook, _ = editions.edition(write(CELLS), kind)
    text = "\n".join(cell["source"] for cell in notebook["cells"])
    assert "title: A mean" not in text and "#|" not in text and "<details>" not in text and "## Recap" in text
    assert "01_data.html#data)" in text
    assert ("It has a reason." in text) == (kind == "solution") and ("BEGIN SOLUTION" in text) == (kind == "instructor")

# --- nbgrader, from release to feedback

def test_a_class(write, tmp_path):
    pytest.importorskip("nbgrader")
    course = tmp_path/"course"; path = write(CELLS)
    editions.make(path, folder=course)
    released = json.loads((course/"student/1_mean/1_mean.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join(editions.source(cell) for cell in released)
    assert "len(numbers)" not in text and "It has a reason" not in text and "def mean(numbers): ...   # your answer" in text
    for student, answer, points in (("right", editions.exercises(path)[0].solution, 1), ("wrong", "def mean(numbers): return sum(numbers)", 0)):
        editions.hand_in(course, "1_mean", student, {1: answer})
        assert editions.grade(course, "1_mean", student)[:2] == (points, 1)         # and nobody ran the slow cell
        feedback = (course/"feedback"/student/"1_mean/1_mean.html").read_text(encoding="utf-8")
        assert ("not yet: that is the sum" in feedback) == (student == "wrong") and ("right: mean(numbers) is their mean" in feedback) == (student == "right")

@pytest.mark.parametrize("path", [path for path in editions.chapters() if path.stem != "11_main"], ids=lambda path: path.stem)   # two lines that start the command line
def test_every_chapter_ends_with_exercises(path):
    "Two to four, each with a hint for the one who has not begun; the tests of the notebooks run their solutions."
    found = editions.exercises(path)
    assert 2 <= len(found) <= 4 and [one.number for one in found] == list(range(1, len(found) + 1))
    for one in found: assert editions.source(one.check).rstrip().endswith(";"), "the check cell would show what `attempt` returns"

def test_a_real_chapter(capsys):
    pytest.importorskip("nbgrader")
    editions.rehearse("10_recipes")                                                 # raises where a solved submission lacks a point or an empty one has one
    said = capsys.readouterr().out
    print(said)
    assert said.count("graded in") == 2

# --- slides

@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    pytest.importorskip("sphinx_revealjs")
    folder = tmp_path_factory.mktemp("slides")                                      # in a process of its own, as Sphinx keeps what an earlier build registered
    subprocess.run([sys.executable, "-c", f"from scdd.editions import show_slides; show_slides(folder={str(folder)!r})"], check=True)
    return {part: folder/f"{part}.html" for part in editions.BOOK}

@pytest.fixture(scope="module")
def browser(chromium):
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright
    from test_browser import FLAGS
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield opened
        opened.close()

WALK = """() => [...document.querySelectorAll('.slides > section')].flatMap((chapter, i) => [...chapter.querySelectorAll('section')].map((slide, j) => {
    Reveal.slide(i, j); const box = slide.getBoundingClientRect();
    return {at: `${i}.${j}`, title: slide.querySelector('h1, h2, h3')?.innerText, top: box.top, bottom: box.bottom, width: slide.scrollWidth - slide.clientWidth, shown: Reveal.getCurrentSlide() === slide}}))"""

@pytest.mark.parametrize("part", editions.BOOK)
def test_slides_in_a_browser(browser, decks, part):
    page, asked, complaints = browser.new_page(viewport={"width": 1280, "height": 720}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(decks[part].as_uri()); page.wait_for_function("() => window.Reveal && Reveal.isReady() && (!window.MathJax || MathJax.startup.promise)")
    found = page.evaluate(WALK)
    chapters = [path for path in editions.notebooks() if path.parent.name == part and len(editions.slides(path)) > 1]
    assert page.evaluate("document.querySelectorAll('.slides > section').length") == 1 + len(chapters)
    assert len(found) == 1 + sum(len(editions.slides(path)) for path in chapters)
    for slide in found:
        assert slide["shown"] and slide["title"], slide
        assert slide["top"] >= 0 and slide["bottom"] <= 720 and slide["width"] <= 0, f"too much for one slide: {slide}"
    images = page.evaluate("[...document.images].map(i => [i.alt, i.naturalWidth, i.src.slice(0, 10)])")
    assert all(len(alt) > 20 and width > 0 and src == "data:image" for alt, width, src in images)
    assert page.evaluate("document.querySelectorAll('aside.notes').length") == len(found)
    assert page.evaluate("document.querySelectorAll('mjx-merror').length") == 0 and page.get_attribute("html", "lang") == "en" and page.title()
    assert not complaints and asked and all(url.split(":")[0] in ("file", "data") for url in asked), (complaints, asked)
    page.close()
