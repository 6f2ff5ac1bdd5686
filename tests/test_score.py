"DD-Ranking's scores against values by hand and the ends of the scale; the split of a gain."
from math import e, exp, sqrt
import pytest
from scdd.files import UserError
from scdd.score import augmentation_robust_score, gap, label_robust_score, on_scale, split_gain

def test_the_scale_by_hand():
    assert on_scale(-1) == 0 and on_scale(1) == 1
    assert on_scale(0) == pytest.approx((1 - 1 / e) / (e - 1 / e)) == pytest.approx(1 / (1 + e))      # 0.2689
    assert on_scale(-0.15) == pytest.approx(0.20967, abs=1e-5)

def test_the_label_robust_score_by_hand():
    assert label_robust_score(0.8, 0.4, 0.6, 0.5) == pytest.approx(0.20967, abs=1e-5)                 # α = 0.5 · 0.1 - 0.5 · 0.4
    assert label_robust_score(0.8, 0.4, 0.6, 0.5, weight=0.8) == pytest.approx(on_scale(0.8 * 0.1 - 0.2 * 0.4)) == pytest.approx(on_scale(0))
    assert label_robust_score(0.8, 0.4, 0.6, 0.5, weight=1) == pytest.approx(on_scale(0.1)) and label_robust_score(0.8, 0.4, 0.6, 0.5, weight=0) == pytest.approx(on_scale(-0.4))
    assert label_robust_score(0.0, 1.0, 1.0, 0.0) == 1 and label_robust_score(1.0, 0.0, 0.0, 1.0) == 0

def test_what_moves_the_label_robust_score():
    base = label_robust_score(0.8, 0.4, 0.6, 0.5)
    assert label_robust_score(0.8, 0.5, 0.6, 0.5) > base > label_robust_score(0.8, 0.4, 0.6, 0.55) and label_robust_score(0.9, 0.4, 0.6, 0.5) < base
    assert label_robust_score(0.8, 0.4, 0.9, 0.8) == pytest.approx(base)                               # better labels lift both alike, and the score stays

def test_the_augmentation_robust_score_by_hand():
    assert augmentation_robust_score(0.5, 0.6, 0.4, 0.2) == pytest.approx((exp(0.05) - exp(-1)) / (e - exp(-1)))   # β = 0.5 · -0.1 + 0.5 · 0.2
    assert augmentation_robust_score(0.5, 0.6, 0.4, 0.2, weight=0.9) == pytest.approx(on_scale(-0.09 + 0.02))
    assert augmentation_robust_score(1.0, 0.0, 1.0, 0.0) == 1 and augmentation_robust_score(0.0, 1.0, 0.0, 1.0) == 0
    assert augmentation_robust_score(0.3, 0.3, 0.7, 0.7) == pytest.approx(on_scale(0))                  # random images themselves

@pytest.mark.parametrize("make, words", [
    (lambda: label_robust_score(81.8, 0.4, 0.6, 0.5), "all_hard 81.8: must be a fraction from 0 to 1; divide per cent by 100"),
    (lambda: label_robust_score(0.8, 0.4, float("nan"), 0.5), "set_any nan: must be a fraction"),
    (lambda: augmentation_robust_score(0.5, 0.6, -0.1, 0.2), "set_as_is -0.1: must be a fraction"),
    (lambda: label_robust_score(0.8, 0.4, 0.6, 0.5, weight=1.5), "weight 1.5: must be from 0 to 1")])
def test_what_is_refused(make, words):
    with pytest.raises(UserError) as error: make()
    assert str(error.value).startswith(words) and "\n" not in str(error.value)

def figure(mean, std, n): return {"mean": mean, "std": std, "n": n}

def test_a_split_adds_up_and_knows_its_errors():
    random_hard, random_soft, made = figure(0.3, 0.03, 3), figure(0.5, 0.04, 4), figure(0.45, 0.06, 3)
    parts = split_gain(random_hard, random_soft, made)
    assert parts["labels"] == (pytest.approx(0.2), pytest.approx(sqrt(0.0003 + 0.0004))) and parts["images"] == (pytest.approx(-0.05), pytest.approx(sqrt(0.0004 + 0.0012)))
    assert random_hard["mean"] + sum(value for value, _ in parts.values()) == pytest.approx(made["mean"])
    assert gap(random_soft, figure(0.4, None, 1)) == (pytest.approx(0.1), None)                         # a single student has no spread
