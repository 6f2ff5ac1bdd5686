"What an exercise says of an answer: its hint, or what was asked where a check has none."
from scdd.classroom import attempt

def test_hints_and_what_was_asked(capsys):
    def silent():
        "the answer is 3"
        raise AssertionError   # as an assertion without words
    def hinting():
        "the answer is 3"
        raise AssertionError("count again")
    def broken():
        "the answer is 3"
        raise ValueError("no number")
    assert not attempt(silent) and not attempt(hinting) and not attempt(broken) and attempt(lambda: None)
    assert capsys.readouterr().out.splitlines()[:3] == ["not yet: the answer is 3", "not yet: count again", "not yet: the answer is 3 (ValueError: no number)"]
