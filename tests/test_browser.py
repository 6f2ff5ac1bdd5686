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
    for name in ("40_playground", "40b_side_by_side"):
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
NOTE = "wanted => [...document.querySelectorAll('.jp-OutputArea .widget-html')].some(e => e.innerText.includes(wanted))"
CHANGED = "old => document.querySelector('.jp-OutputArea .widget-html img').src != old"
SLOWEST = 0.2   # seconds for a reaction, the quickest of several, since other work may keep the machine busy

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

def control(page, label): return page.locator(".jp-OutputArea .widget-hslider", has=page.get_by_text(label, exact=True)).locator(".noUi-handle")

def button(page, name): return page.locator(".jp-OutputArea").get_by_role("button", name=name)

def press(page, handle, key, times=1):
    handle.scroll_into_view_if_needed(); handle.focus()
    for _ in range(times): page.keyboard.press(key)

def seconds(page, act, seen, arg=None):
    "How long it takes from doing something until it is seen in the page."
    began = time.monotonic(); act(); page.wait_for_function(seen, arg=arg, timeout=30_000)
    return time.monotonic() - began

def quick(what, *spent):
    print(f"{what} in", ", ".join(f"{1000 * one:.0f} ms" for one in spent)); assert min(spent) < SLOWEST

# --- the playground

@pytest.fixture(scope="module")
def playground(browser, lab):
    page = opened(browser, lab, "40_playground")
    page.wait_for_function(SAYS, arg="step 60 of 60", timeout=600_000)                   # the first film is there, at its end
    idle(page)
    yield page
    page.close()

def test_playground_in_jupyterlab(playground, tmp_path):
    page = playground; no_errors(page)
    image = page.locator(".jp-OutputArea .widget-html img").first
    assert "recovered images" in image.get_attribute("alt") and chosen(page.locator(".jp-OutputArea .widget-vbox").first) == ["one of each", "noise"]
    def back():                                                                          # through frames that are there
        before = image.get_attribute("src")
        return seconds(page, lambda: page.keyboard.press("ArrowLeft"), CHANGED, before)
    control(page, "step").scroll_into_view_if_needed(); control(page, "step").focus()
    quick("the picture followed the slider", *(back() for _ in range(5)))
    assert step_shown(page) < 60

    press(page, control(page, "steps"), "ArrowLeft")                                     # other settings: nothing moves until asked
    page.wait_for_function(NOTE, arg="Not recovered yet", timeout=30_000)
    button(page, "recover").press("Enter")
    page.wait_for_function(SAYS, arg="step 30 of 30", timeout=60_000)
    picture(page.locator(".jp-OutputArea .widget-vbox").first, tmp_path, "playground")

def step_shown(page): return int(page.locator(SHOWN).first.inner_text().split()[1])

def test_playground_obeys_while_it_runs(playground, tmp_path):
    page = playground
    press(page, control(page, "steps"), "Home"); press(page, control(page, "steps"), "ArrowRight", 3)
    page.wait_for_function(NOTE, arg="Not recovered yet", timeout=30_000)
    before = page.locator(".jp-OutputArea .widget-html img").first.get_attribute("src")
    began = [seconds(page, lambda: button(page, "recover").press("Enter"), "() => getComputedStyle(document.querySelector('.jp-OutputArea .widget-hprogress')).visibility == 'visible'")]
    page.wait_for_function(CHANGED, arg=before, timeout=60_000)                          # a first picture, and then others while it runs
    page.wait_for_function(SAYS.replace("startsWith(wanted)", "match(/^step [1-9]\\d* of 300/)"), timeout=60_000)
    press(page, control(page, "r_bn"), "ArrowLeft", 3)
    page.wait_for_function(NOTE, arg="Turned on the way: r_bn", timeout=30_000)
    halted = []
    for _ in range(3):
        halted.append(seconds(page, lambda: button(page, "stop").press("Enter"), NOTE, "Stop"))
        page.wait_for_function(NOTE, arg="Stopped at step", timeout=30_000); at = step_shown(page)
        page.wait_for_timeout(300); assert at < 300 and step_shown(page) == at
        if len(halted) == 2: picture(page.locator(".jp-OutputArea .widget-vbox").first, tmp_path, "stopped")
        began.append(seconds(page, lambda: button(page, "go on").press("Enter"), "() => [...document.querySelectorAll('.jp-OutputArea button')].some(b => b.innerText == 'stop' && !b.disabled)"))
    quick("recover and go on began", *began); quick("stop answered", *halted)
    page.wait_for_function(SAYS, arg="step 300 of 300", timeout=120_000)
    no_errors(page)

# --- side by side

@pytest.fixture(scope="module")
def beside(browser, lab):
    page = opened(browser, lab, "40b_side_by_side")
    with_control(page, "sort by").wait_for(timeout=600_000); idle(page)                  # the last one is there
    yield page
    page.close()

def with_control(page, label): return page.locator(".jp-OutputArea .widget-vbox", has=page.get_by_text(label, exact=True))

def widget(page, label):
    box = with_control(page, label); box.scroll_into_view_if_needed()
    return box

def picture(box, tmp_path, name): box.screenshot(path=tmp_path/f"{name}.png")

SHOWS = "([label, wanted]) => [...document.querySelectorAll('.jp-OutputArea .widget-vbox')].some(box => [...box.querySelectorAll('label')].some(l => l.innerText == label) && box.innerText.includes(wanted))"
OTHER = "([box, said]) => box.innerText != said"

def chosen(box): return box.evaluate("box => [...box.querySelectorAll('select')].map(one => one.options[one.selectedIndex]?.text.replaceAll('\\u00a0', ' '))")

def choose(box, label, value): box.get_by_label(label, exact=True).select_option(value)

def test_statistics_follow_the_layer(beside, tmp_path):
    page, box = beside, widget(beside, "layer")
    no_errors(page)
    assert "layer 1:" in box.inner_text() and box.locator("svg[role=img]").count() == 2
    before = box.locator("svg").first.inner_html(); box.locator(".noUi-handle").focus()
    quick("the statistics followed the slider", *(seconds(page, lambda: page.keyboard.press("ArrowRight"), SHOWS, ["layer", f"layer {layer}:"]) for layer in range(2, 7)))
    assert box.locator("svg").first.inner_html() != before and "spread" in box.locator("svg").first.get_attribute("aria-label")
    page.keyboard.press("End"); page.wait_for_function(SHOWS, arg=["layer", "layer 20:"], timeout=30_000)
    picture(box, tmp_path, "statistics")

def test_beliefs_follow_the_class(beside, tmp_path):
    page, box = beside, widget(beside, "teacher")
    assert box.locator("img").count() == 15 and all(one.get_attribute("alt").endswith("of the class 0") for one in box.locator("img").all())
    before = box.locator("img").first.get_attribute("src")
    quick("the images followed the class", *(seconds(page, lambda: choose(box, "class", label), SHOWS, ["teacher", f"belief in the class {label}"]) for label in "12345"))
    assert box.locator("img").first.get_attribute("src") != before
    said = box.inner_text()
    choose(box, "teacher", "SimCLR"); page.wait_for_function(OTHER, arg=[box.element_handle(), said], timeout=30_000)
    picture(box, tmp_path, "beliefs")

def test_soft_label_follows_the_mixture(beside, tmp_path):
    page, box = beside, widget(beside, "temperature")
    choose(box, "first", "3"); choose(box, "second", "7"); choose(box, "mix", "cutmix")
    page.wait_for_function(SHOWS, arg=["temperature", "cutmix"], timeout=30_000)
    image = box.locator("img").last.get_attribute("src")
    control(page, "weight").focus()
    def on(): said = box.inner_text(); return seconds(page, lambda: page.keyboard.press("PageUp"), OTHER, [box.element_handle(), said])
    quick("the soft label followed the weight", *(on() for _ in range(4)))
    assert box.locator("img").last.get_attribute("src") != image
    picture(box, tmp_path, "mixture")

def test_leaderboard_keeps_protocols_apart(beside, tmp_path):
    page, box = beside, widget(beside, "sort by")
    assert chosen(box) == ["any"] * 5 + ["accuracy"]
    blocks = lambda: [[float(text.split()[0]) for text in one.locator("td:nth-child(2)").all_inner_texts()] for one in box.locator("tbody").all()]
    everything = blocks(); assert len(everything) > 5 and "never across" in box.inner_text()
    assert all(one == sorted(one, reverse=True) for one in everything) and sum(everything, []) != sorted(sum(everything, []), reverse=True)
    picture(box, tmp_path, "leaderboard")
    count = "([box, n]) => box.querySelectorAll('tbody').length == n"; total = len(everything)
    digits = sum("digits" in one for one in box.locator("tbody th").all_inner_texts())
    quick("the table followed the filter", *(seconds(page, lambda: choose(box, "data", data), count, [box.element_handle(), n]) for data, n in [("digits", digits), ("any", total)] * 2))
    choose(box, "data", "digits"); choose(box, "labels", "hard"); choose(box, "student", "resnet18")
    page.wait_for_function(SHOWS, arg=["sort by", "under one protocol"], timeout=30_000)
    assert 0 < len(sum(blocks(), [])) < len(sum(everything, [])) and all(one.inner_text().startswith("scdd ") for one in box.locator("tbody code").all())

@pytest.mark.parametrize("name", ["layer", "teacher", "temperature", "sort by"])
def test_controls_fit_a_narrow_window(beside, name, tmp_path):
    beside.set_viewport_size({"width": 800, "height": 1000}); box = widget(beside, name)
    picture(box, tmp_path, "narrow")
    cut = box.evaluate("box => [...box.querySelectorAll('.widget-inline-hbox')].filter(e => e.getBoundingClientRect().right > box.closest('.jp-OutputArea').getBoundingClientRect().right + 1).length")
    assert not cut
