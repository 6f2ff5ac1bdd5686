"The report: its fields, its page, and what stands where nothing was measured."
import json, re
from html.parser import HTMLParser
import numpy as np, pytest
from scdd.data import load, random_subset
from scdd.files import UserError
from scdd.recipes import RECIPES
from dataclasses import replace
import scdd.train as module
from scdd.train import KINDS, Report, duration, git_commit, percent, provenance, size, summary

def make(**changes):
    accuracy = {kind: summary([0.9, 0.91, 0.92]) | {"curves": [], "seconds": 1.0} for kind in KINDS}
    curves = {"pretraining": {"ssl": [{"epoch": e, "loss": 1 / e, "knn": 0.5 + e / 100} for e in (1, 2, 3)]}, "recovery": {"images": [{"step": s, "loss": 9 - s, "bn": 1.0} for s in range(5)]},
              "students": {"distilled, soft": [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.05, "accuracy": 0.9}]}}
    recipe = replace(RECIPES["digits"], about='<script>alert("x")</script> & more')
    return Report(**{**dict(recipe=recipe, **provenance("cpu"), accuracy=accuracy, seconds={"pretrain": 20.0, "train": 300.0}, bytes={"images": 25600}, peak_memory_bytes=10**9,
                            curves=curves, teachers={"supervised": 0.989}, command="scdd run digits"), **changes})

class Page(HTMLParser):
    def __init__(self, text): super().__init__(); self.tags, self.open = [], []; self.feed(text)
    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def all(self, name): return [attributes for tag, attributes in self.tags if tag == name]

@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report"); data = load("digits")
    text = make().save(folder, random_subset(data, 3), random_subset(data, 3, 1)).read_text(encoding="utf-8")
    return text, Page(text)

def test_json_has_its_fields(tmp_path):
    report = make(); report.save(tmp_path); found = json.loads((tmp_path/"report.json").read_text())
    assert set("recipe commit device versions accuracy seconds bytes peak_memory_bytes".split()) <= set(found)
    assert set(found["accuracy"]) == set("distilled_soft distilled_hard random_soft random_hard full_data".split())
    assert set(found["accuracy"]["distilled_soft"]) == {"mean", "std", "n", "values"} and found["recipe"]["recover"]["steps"] == 300
    assert Report.load(tmp_path) == report and sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]

def test_page_is_whole_and_needs_nothing_else(page):
    text, parsed = page
    assert not parsed.open and text.startswith("<!doctype html>")
    assert parsed.all("html")[0]["lang"] == "en" and any(m.get("name") == "viewport" for m in parsed.all("meta")) and len(parsed.all("title")) == 1
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "@import" not in text and "url(" not in text and not parsed.all("script")
    assert "prefers-color-scheme:dark" in text and len(text) < 1_000_000

def test_page_shows_images_curves_and_bars(page):
    images = page[1].all("img")
    assert len(images) == 6 and all(len(image["alt"]) > 20 and image["src"].startswith("data:image/png;base64,") for image in images)
    assert [t for t, _ in page[1].tags if t in ("h1", "h2")] == ["h1"] + ["h2"] * 7
    for words in ("91.0 ± 1.0 % (n = 3)", "98.9 %", "5.0 min", "scdd run digits", "25.6 kB", "1.0 GB", "recover.steps"): assert words in page[0]

def test_text_is_escaped(page):
    assert "<script>" not in page[0] and "&lt;script&gt;" in page[0]

def test_what_was_not_measured(tmp_path):
    one = make(accuracy={"random_hard": summary([0.5])}, curves={}, teachers={}, command="")
    text = one.save(tmp_path).read_text(encoding="utf-8")
    assert one.accuracy["full_data"] is None and one.accuracy["random_hard"]["std"] is None and text.count(">not measured<") == 4 and "50.0 % (n = 1)" in text
    Page(make(accuracy={}).save(tmp_path).read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="best"): make(accuracy={"best": summary([0.5])})

def test_single_students_have_no_deviation(): assert percent(summary([0.123])) == "12.3 % (n = 1)" and percent(summary([0.1, 0.2])) == "15.0 ± 7.1 % (n = 2)"

def test_units(): assert (size(0), size(999), size(113.33e9), duration(3), duration(7000), duration(8000)) == ("0 B", "999 B", "113.3 GB", "3.0 s", "116.7 min", "2.2 h")

def test_images_of_many_classes_and_uneven_rows(tmp_path):
    data = load("digits"); picture = module.contact_sheet(data.subset(np.r_[0:30, 60:75]), "uneven", columns=4, classes=3)
    assert "3 rows" in picture.alt

def test_provenance(tmp_path, monkeypatch):
    found = provenance("cpu")
    assert set(found) == {"commit", "device", "versions"} and {"python", "torch", "torchvision", "timm", "scdd", "platform", "cores"} <= set(found["versions"])
    assert git_commit(tmp_path) is None
    monkeypatch.setattr(module, "git_commit", lambda folder: None); assert module.commit()
    def none(name): raise module.importlib.metadata.PackageNotFoundError
    monkeypatch.setattr(module.importlib.metadata, "distribution", none); assert module.commit() == "unknown"

def test_a_report_of_something_else(tmp_path):
    (tmp_path/"report.json").write_text("{}")
    with pytest.raises(UserError, match="not a report of this version"): Report.load(tmp_path)

def test_accuracies_of_a_search_are_none_of_the_test_set(tmp_path):
    from dataclasses import replace
    report = make(); report.recipe["data"] = {"name": "digits", "held_out": 0.2}
    text = report.save(tmp_path).read_text(encoding="utf-8")
    assert "held-out training images" in text and ">held-out accuracy<" in text and "whole test set" not in text and ">test accuracy<" not in text
