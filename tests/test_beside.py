"The leaderboard of chapter 40b: which result files it reads, and that a shared figure counts once."
import shutil
from scdd.beside import results
from scdd.files import read_json, write_json
from scdd.site import root

KEPT = root()/"nbs"/"experiments"/"results"

def test_a_figure_that_two_runs_share_counts_once(tmp_path):
    shutil.copy(KEPT/"cifar100-narrow.json", tmp_path/"one.json")
    again = read_json(KEPT/"cifar100-narrow.json") | {"command": "the same with another option"}
    write_json(tmp_path/"two.json", again)
    assert [row["labels"] for row in results(tmp_path)] == ["soft", "hard"]
    again["accuracy"]["distilled_hard"]["mean"] += 0.01; write_json(tmp_path/"two.json", again)
    assert [row["labels"] for row in results(tmp_path)] == ["soft", "hard", "hard"]

def test_an_experiment_without_full_data_is_passed_over(tmp_path):
    shutil.copy(KEPT/"cifar100-mini-backbones.json", tmp_path/"one.json")
    assert any("distilled_soft" in row for row in read_json(tmp_path/"one.json")["rows"]) and results(tmp_path) == []

def test_hard_labels_alone_are_results_too(tmp_path):
    found = read_json(KEPT/"digits-compare.json")
    for row in found["rows"]: del row["distilled_soft"], row["random_soft"]
    write_json(tmp_path/"one.json", found)
    rows = results(tmp_path)
    assert len(rows) == len(found["rows"]) and {row["labels"] for row in rows} == {"hard"}

def test_who_made_the_images_says_what_was_done_to_the_network_and_added_to_recovery(tmp_path):
    found = read_json(KEPT/"cifar100-narrow.json")
    found["recipe"]["align"]["finetune"] = 0.01; found["recipe"]["relabel"]["teacher"] = "ssl"; found["recipe"]["extra"] |= {"residual": 0.5, "backbones": ["convnet"]}
    write_json(tmp_path/"one.json", found)
    assert {row["images by"] for row in results(tmp_path)} == {"scdd (mocov2, fine-tuned, patch, patches again, several networks)"}
    assert [row["labels by"] for row in results(tmp_path)] == ["mocov2, fine-tuned", "none"]
