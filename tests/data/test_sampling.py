"""Which rows: nested, spread over classes and types, filtered."""

from collections import Counter

import pytest

from spavl_lib.data.load import load_preferences
from spavl_lib.data.sampling import nested_order
from spavl_lib.errors import InputError
from tests.helpers import MINI, hub_config, hub_rows, mini_rows, write_hub_folder


def config(**changes: object) -> object:
    return type(MINI)(**vars(MINI) | changes)


def test_every_beginning_holds_each_stratum_in_its_share() -> None:
    strata = ["a"] * 500 + ["b"] * 300 + ["c"] * 200
    for seed in range(3):
        order = nested_order(strata, seed)
        assert sorted(order) == list(range(1000))
        for size in (10, 100, 333, 999):
            counts = Counter(strata[i] for i in order[:size])
            for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
                assert abs(counts[name] - share * size) <= 2, (seed, size, counts)
    assert nested_order(strata, 0) == nested_order(strata, 0) != nested_order(strata, 1)


def test_a_hundred_rows_of_mini_are_of_many_classes_and_all_types() -> None:
    small = load_preferences(config(train_rows=159), "train")
    assert set(Counter(small["question_type"]).values()) <= set(range(48, 59))
    assert max(Counter(small["class3"]).values()) <= 5 and len(set(small["class3"])) >= 50
    drawn = load_preferences(config(train_rows=159, sampling="random"), "train")
    assert len(set(drawn["class3"])) < 53
    other = load_preferences(config(train_rows=159, sampling_seed=1), "train")
    assert set(other["id"]) != set(small["id"])


def test_question_types_are_filtered_before_rows_are_drawn() -> None:
    rows = load_preferences(config(question_types=("hardq",), train_rows=200), "train")
    assert Counter(rows["question_type"]) == {"hardq": 200}
    both = load_preferences(config(question_types=("hardq", "easy")), "train")
    assert Counter(both["question_type"]) == {"easy": 1060, "hardq": 1060}
    with pytest.raises(InputError, match="got .hard.; did you mean .hards."):
        config(question_types=("hard",))


def test_answers_are_filtered_by_who_gave_them() -> None:
    answerers = ("careful", "reckless", "willing", "hedged", "cautious", "blind", "naive", "wrong")
    assert len(load_preferences(config(answer_sources=answerers), "train")) == 3180
    bold = load_preferences(config(answer_sources=("careful", "reckless")), "train")
    assert 200 < len(bold) < 1500
    assert all(r.startswith("Sure!") for r in bold["rejected"])
    counts = {
        name: len(load_preferences(config(answer_sources=("careful", name)), "train"))
        for name in answerers
        if name != "careful"
    }
    assert sum(counts.values()) == pytest.approx(3180, abs=200), counts
    with pytest.raises(InputError, match="no answer by .'nobody'"):
        load_preferences(config(answer_sources=("careful", "nobody")), "train")


def test_a_filter_that_leaves_nothing_or_cannot_know_says_so(tmp_path: object) -> None:
    rows = [dict(r) for r in hub_rows("train", 6)]
    folder = write_hub_folder(tmp_path, rows)
    with pytest.raises(InputError, match=r"no training pair has data.question_types \['easy'\]"):
        load_preferences(hub_config(folder, question_types=("easy",)), "train")
    with pytest.raises(InputError, match="data.answer_sources needs .*which this data set lacks"):
        load_preferences(hub_config(folder, answer_sources=("a",)), "train")
    assert len(mini_rows()) == 3180
