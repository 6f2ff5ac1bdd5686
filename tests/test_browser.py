"What a reader meets in a browser: the report of a run, and the playground in JupyterLab."
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

# --- the playground

def free_port():
    with socket.socket() as one: one.bind(("127.0.0.1", 0)); return one.getsockname()[1]

@pytest.fixture
def lab(tmp_path):
    "A JupyterLab with the playground in it, as its address."
    notebook = json.loads((ROOT/"nbs/practice/40_playground.ipynb").read_text(encoding="utf-8"))
    notebook["cells"] = [cell for cell in notebook["cells"] if "nbdev_export()" not in "".join(cell["source"])]
    place = tmp_path/"lab"; place.mkdir()
    (place/"playground.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    tracker = tmp_path/"settings/@jupyterlab/notebook-extension"; tracker.mkdir(parents=True)
    (tracker/"tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')      # keep all cells in the page
    port, env = free_port(), os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path/"config"), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path/"workspaces")}
    with open(tmp_path/"lab.log", "w") as log:
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

def idle(page):
    # the notebook's own indicator says idle before there is a kernel; the status bar does not
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=300_000)

def slider(page, label): return page.locator(".widget-hslider", has=page.get_by_text(label, exact=True))

def press(page, handle, key, times):
    handle.scroll_into_view_if_needed(); handle.focus()
    for _ in range(times): page.keyboard.press(key)

def step_shown(page): return int(page.locator(SHOWN).inner_text().split()[1])

def test_playground_in_jupyterlab(browser, lab, tmp_path):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}/lab/tree/playground.ipynb?reset"); page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
    idle(page); page.wait_for_timeout(500)
    page.get_by_role("menuitem", name="Run", exact=True).click(); page.get_by_text("Run All Cells", exact=True).click()
    step = slider(page, "step"); step.wait_for(timeout=900_000)
    page.wait_for_function(SAYS, arg="step 100 of 100", timeout=300_000)                 # the first film is there, at its end
    page.wait_for_function("() => [...document.querySelectorAll('.jp-OutputArea button')].some(b => b.innerText == 'recover' && !b.disabled)", timeout=120_000)
    assert not page.locator('.jp-OutputArea [data-mime-type="application/vnd.jupyter.stderr"]', has_text="Error").count()

    began, before = time.monotonic(), page.locator(".jp-OutputArea .widget-html img").get_attribute("src")
    press(page, step.locator(".noUi-handle"), "ArrowLeft", 3)                            # back through frames that are there
    page.wait_for_function("old => document.querySelector('.jp-OutputArea .widget-html img').src != old", arg=before, timeout=30_000)
    print(f"the picture followed the slider in {time.monotonic() - began:.2f} s")
    page.wait_for_function("() => +document.querySelector('.jp-OutputArea .widget-html b').innerText.split(' ')[1] < 100", timeout=30_000)
    assert "recovered images" in page.locator(".jp-OutputArea .widget-html img").get_attribute("alt")

    press(page, slider(page, "steps").locator(".noUi-handle"), "ArrowLeft", 1)           # other settings: nothing moves until asked
    page.get_by_text("Not recovered yet").wait_for(timeout=30_000)
    page.get_by_role("button", name="recover").press("Enter")
    page.wait_for_function(SAYS, arg="step 50 of 50", timeout=300_000)
    page.screenshot(path=tmp_path/"playground.png")
    page.close()
