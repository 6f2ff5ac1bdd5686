"What a reader meets in a browser: the report of a run, and the notebooks with controls in JupyterLab."
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest
from conftest import ROOT

pytest.importorskip("playwright")
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield opened
        opened.close()

# --- the report

@pytest.fixture(scope="module")
def report(browser, quick_run):
    "The page of a small run, what it asked for, and what it complained about."
    page, asked, complaints = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((quick_run/"report.html").as_uri())
    yield page, asked, complaints
    page.close()

def test_report_shows_its_images(report):
    page, _, _ = report
    images = page.evaluate("[...document.images].map(i => [i.alt, i.complete && i.naturalWidth])")
    assert len(images) >= 5                                          # bars, two sheets of images, curves
    for alt, width in images: assert width > 0 and len(alt) > 20, alt
    assert any("Distilled" in alt for alt, _ in images) and any("Random real" in alt for alt, _ in images)

def test_report_needs_no_network(report):
    page, asked, complaints = report
    assert not complaints
    assert asked and all(url.split(":")[0] in ("file", "data") for url in asked), asked

def test_report_is_in_order(report):
    page, _, _ = report
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:])), levels
    assert page.title() and page.get_attribute("html", "lang") == "en"
    assert page.get_by_role("heading", name="Accuracy").is_visible()

def test_report_says_the_figures(report, quick_run):
    page, _, _ = report
    shown, found = page.inner_text("main"), json.loads((quick_run/"report.json").read_text(encoding="utf-8"))
    for figure in found["accuracy"].values(): assert f"{100 * figure['mean']:.1f} %" in shown
    assert found["commit"] in shown

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_fits_a_phone(browser, quick_run, scheme, tmp_path):
    page = browser.new_page(viewport={"width": 375, "height": 800}, color_scheme=scheme)
    page.goto((quick_run/"report.html").as_uri())
    for opened in page.locator("summary").all(): opened.click()
    page.screenshot(path=tmp_path/f"phone-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    cut = page.evaluate("""[...document.querySelectorAll('figure img')].filter(i => i.getBoundingClientRect().right > innerWidth).map(i => i.alt)""")
    page.close()
    assert not cut

# --- the notebooks with controls

def free_port():
    with socket.socket() as one: one.bind(("127.0.0.1", 0)); return one.getsockname()[1]

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab with the notebooks in it, as its address."
    place, own = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT/"nbs/experiments/results", place/"experiments/results"); (place/"practice").mkdir()
    for name in ("40_playground", "40_side_by_side"):
        notebook = json.loads((ROOT/f"nbs/practice/{name}.ipynb").read_text(encoding="utf-8"))
        notebook["cells"] = [cell for cell in notebook["cells"] if "nbdev_export()" not in "".join(cell["source"])]
        (place/f"practice/{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    tracker = own/"settings/@jupyterlab/notebook-extension"; tracker.mkdir(parents=True)
    (tracker/"tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')      # keep all cells in the page
    port, env = free_port(), os.environ | {"JUPYTER_CONFIG_DIR": str(own/"config"), "JUPYTERLAB_SETTINGS_DIR": str(own/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(own/"workspaces")}
    with open(own/"lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
            "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={place}"], env=env, stdout=log, stderr=log)
        try:
            for _ in range(240):
                try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1); break
                except OSError: time.sleep(.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try: server.wait(20)
            except subprocess.TimeoutExpired: server.kill()

SHOWN = ".jp-OutputArea .widget-html b"
SAYS = "wanted => { const shown = document.querySelector('.jp-OutputArea .widget-html b'); return shown && shown.innerText.startsWith(wanted) }"
CHANGED = "old => document.querySelector('.jp-OutputArea .widget-html img').src != old"
SLOWEST = 3   # seconds for a reaction while other work keeps the machine busy; on two free cores it is a tenth of that

def idle(page):
    # the notebook's own indicator says idle before there is a kernel; the status bar does not
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=300_000)

def opened(browser, lab, name):
    "A page with a notebook whose cells have all been told to run."
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}/lab/tree/practice/{name}.ipynb?reset"); page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
    idle(page); page.wait_for_timeout(500)
    page.get_by_role("menuitem", name="Run", exact=True).click(); page.get_by_text("Run All Cells", exact=True).click()
    return page

def no_errors(page): assert not page.locator('.jp-OutputArea [data-mime-type="application/vnd.jupyter.stderr"]', has_text="Error").count()

def slider(page, label): return page.locator(".widget-hslider", has=page.get_by_text(label, exact=True))

def press(page, handle, key, times):
    handle.scroll_into_view_if_needed(); handle.focus()
    for _ in range(times): page.keyboard.press(key)

def step_shown(page): return int(page.locator(SHOWN).inner_text().split()[1])

def reacts(page, what, act, seen, arg=None):
    "Do something, wait until it is seen in the page, and say how long that took."
    began = time.monotonic(); act(); page.wait_for_function(seen, arg=arg, timeout=30_000); spent = time.monotonic() - began
    print(f"{what} in {spent:.2f} s")
    assert spent < SLOWEST

# --- the playground

@pytest.fixture(scope="module")
def playground(browser, lab):
    page = opened(browser, lab, "40_playground")
    yield page
    page.close()

def test_playground_in_jupyterlab(playground, tmp_path):
    page = playground
    step = slider(page, "step"); step.wait_for(timeout=900_000)
    page.wait_for_function(SAYS, arg="step 100 of 100", timeout=300_000)                 # the first film is there, at its end
    page.wait_for_function("() => [...document.querySelectorAll('.jp-OutputArea button')].some(b => b.innerText == 'recover' && !b.disabled)", timeout=120_000)
    no_errors(page)

    before = page.locator(".jp-OutputArea .widget-html img").get_attribute("src")
    reacts(page, "the picture followed the slider", lambda: press(page, step.locator(".noUi-handle"), "ArrowLeft", 3), CHANGED, before)   # back through frames that are there
    page.wait_for_function("() => +document.querySelector('.jp-OutputArea .widget-html b').innerText.split(' ')[1] < 100", timeout=30_000)
    assert "recovered images" in page.locator(".jp-OutputArea .widget-html img").get_attribute("alt")

    press(page, slider(page, "steps").locator(".noUi-handle"), "ArrowLeft", 1)           # other settings: nothing moves until asked
    page.get_by_text("Not recovered yet").wait_for(timeout=30_000)
    page.get_by_role("button", name="recover").press("Enter")
    page.wait_for_function(SAYS, arg="step 50 of 50", timeout=300_000)
    page.screenshot(path=tmp_path/"playground.png")

def test_playground_obeys_while_it_runs(playground, tmp_path):
    page, says = playground, lambda words: f"() => [...document.querySelectorAll('.jp-OutputArea .widget-html')].some(e => e.innerText.includes('{words}'))"
    button = lambda name: page.locator(".jp-OutputArea").get_by_role("button", name=name)
    press(page, slider(page, "steps").locator(".noUi-handle"), "ArrowRight", 4)
    page.wait_for_function(says("Not recovered yet"), timeout=30_000)
    bar = page.locator(".jp-OutputArea .widget-hprogress")
    before = page.locator(".jp-OutputArea .widget-html img").get_attribute("src")
    reacts(page, "recover showed its bar", lambda: button("recover").press("Enter"), "() => getComputedStyle(document.querySelector('.jp-OutputArea .widget-hprogress')).visibility == 'visible'")
    page.wait_for_function(CHANGED, arg=before, timeout=60_000)                          # a first picture, and then others while it runs
    page.wait_for_function(SAYS.replace("startsWith(wanted)", "match(/^step [1-9]\\d* of 300/)"), timeout=60_000)
    press(page, slider(page, "r_bn").locator(".noUi-handle"), "ArrowLeft", 3)
    page.wait_for_function(says("Turned on the way: r_bn"), timeout=30_000)
    reacts(page, "stop stopped", lambda: button("stop").press("Enter"), says("Stopped at step"))
    at = step_shown(page); page.screenshot(path=tmp_path/"stopped.png"); page.wait_for_timeout(500)
    assert at < 300 and step_shown(page) == at
    reacts(page, "go on went on", lambda: button("go on").press("Enter"), "at => +document.querySelector('.jp-OutputArea .widget-html b').innerText.split(' ')[1] > at", at)
    page.wait_for_function(SAYS, arg="step 300 of 300", timeout=300_000)
    no_errors(page)

# --- side by side

@pytest.fixture(scope="module")
def beside(browser, lab):
    page = opened(browser, lab, "40_side_by_side")
    with_control(page, "sort by").wait_for(timeout=900_000); idle(page)                 # the last one is there
    yield page
    page.close()

def with_control(page, label): return page.locator(".jp-OutputArea .widget-vbox", has=page.get_by_text(label, exact=True))

def drawing(page, label, tmp_path, shot=None):
    "What a widget with this control has drawn: its text, and a screenshot of it."
    box = with_control(page, label); box.scroll_into_view_if_needed()
    if shot: box.screenshot(path=tmp_path/f"{shot}.png")
    return box

SHOWS = "([label, wanted]) => [...document.querySelectorAll('.jp-OutputArea .widget-vbox')].some(box => [...box.querySelectorAll('label')].some(l => l.innerText == label) && box.innerText.includes(wanted))"

def choose(box, label, value): box.locator(".widget-dropdown", has_text=label).locator("select").select_option(value)

def test_statistics_follow_the_layer(beside, tmp_path):
    page, box = beside, drawing(beside, "layer", tmp_path)
    no_errors(page)
    assert "layer 1:" in box.inner_text() and box.locator("svg[role=img]").count() == 2
    before = box.locator("svg").first.inner_html()
    reacts(page, "the statistics followed the slider", lambda: press(page, box.locator(".noUi-handle"), "ArrowRight", 1), SHOWS, ["layer", "layer 2:"])
    assert box.locator("svg").first.inner_html() != before and "spread" in box.locator("svg").first.get_attribute("aria-label")
    press(page, box.locator(".noUi-handle"), "End", 1); page.wait_for_function(SHOWS, arg=["layer", "layer 20:"], timeout=30_000)
    drawing(page, "layer", tmp_path, "statistics")

def test_beliefs_follow_the_class(beside, tmp_path):
    page, box = beside, drawing(beside, "teacher", tmp_path)
    assert box.locator("img").count() == 15 and all(one.get_attribute("alt").endswith("of the class 0") for one in box.locator("img").all())
    before = box.locator("img").first.get_attribute("src")
    reacts(page, "the images followed the class", lambda: choose(box, "class", "3"), SHOWS, ["teacher", "belief in the class 3"])
    assert box.locator("img").first.get_attribute("src") != before
    said = box.inner_text()
    drawing(page, "teacher", tmp_path, "beliefs")
    choose(box, "teacher", "SimCLR"); page.wait_for_function("([box, said]) => box.innerText != said", arg=[box.element_handle(), said], timeout=30_000)

def test_soft_label_follows_the_mixture(beside, tmp_path):
    page, box = beside, drawing(beside, "temperature", tmp_path)
    choose(box, "first", "3"); choose(box, "second", "7"); choose(box, "mix", "cutmix")
    page.wait_for_function(SHOWS, arg=["temperature", "cutmix"], timeout=30_000)
    before = box.locator("img").last.get_attribute("src"), box.inner_text()
    weight = box.locator(".widget-hslider", has=page.get_by_text("weight", exact=True)).locator(".noUi-handle")
    began = time.monotonic(); press(page, weight, "ArrowRight", 10)
    page.wait_for_function("([box, said]) => box.innerText != said", arg=[box.element_handle(), before[1]], timeout=30_000)
    print(f"the soft label followed the weight in {time.monotonic() - began:.2f} s"); assert time.monotonic() - began < SLOWEST
    page.wait_for_function("([image, old]) => image.src != old", arg=[box.locator("img").last.element_handle(), before[0]], timeout=30_000)
    drawing(page, "temperature", tmp_path, "mixture")

def test_leaderboard_filters_by_protocol(beside, tmp_path):
    page, box = beside, drawing(beside, "sort by", tmp_path)
    rows = lambda: box.locator("tbody tr").count()
    everything = rows(); assert everything > 20 and "protocols: accuracies compare within a protocol only" in box.inner_text()
    drawing(page, "sort by", tmp_path, "leaderboard")
    reacts(page, "the table followed the filter", lambda: choose(box, "data", "digits"), "([box, all]) => box.querySelectorAll('tbody tr').length < all", [box.element_handle(), everything])
    choose(box, "labels", "hard"); choose(box, "student", "resnet18")
    page.wait_for_function(SHOWS, arg=["sort by", "one protocol"], timeout=30_000)
    assert 0 < rows() < everything and all(one.inner_text().startswith("scdd ") for one in box.locator("tbody code").all())
    shown = [float(text.split()[0]) for text in box.locator("tbody tr td:nth-child(2)").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
