"""The harm taxonomy: 6 / 15 / 53, verbatim keys, parents, names for readers."""

import re

from spavl_lib.data.taxonomy import PARENTS, TAXONOMY, classes, display

# class2 -> (class1, number of class3), as counted over the real set's harm split.
SECONDARY = {
    "Toxic": ("Representation & ToxicityHarms", 7),
    "Unfair": ("Representation & ToxicityHarms", 6),
    "Erosion of trust in public information": ("Misinformation Harms", 2),
    "false beliefs": ("Misinformation Harms", 3),
    "dangerous information": ("Information & Safety Harms", 2),
    "Privacy": ("Information & Safety Harms", 1),
    "Security threats": ("Malicious Use", 4),
    "Defamation": ("Malicious Use", 1),
    "Fraud or deceptive action": ("Malicious Use", 8),
    "Influence operations": ("Malicious Use", 3),
    "Illegal activities": ("Malicious Use", 6),
    "Persuasion and manipulation": ("Human Autonomy & IntegrityHarms", 2),
    "Violation of personal property": ("Human Autonomy & IntegrityHarms", 3),
    "Risky financial practices": ("Socioeconomic Harms", 3),
    "Trade and compliance": ("Socioeconomic Harms", 2),
}
# Typos and missing spaces of the real set, which a tidy hand would mend and so break the join.
VERBATIM = {
    "disablity discrimination": ("Representation & ToxicityHarms", "Unfair"),
    "scamns": ("Malicious Use", "Fraud or deceptive action"),
    "paypal lending": ("Socioeconomic Harms", "Risky financial practices"),
    "physical harm": ("Human Autonomy & IntegrityHarms", "Persuasion and manipulation"),
    "illegal drugs": ("Misinformation Harms", "Erosion of trust in public information"),
}


def test_there_are_6_15_and_53_classes() -> None:
    assert [len(classes(level)) for level in (1, 2, 3)] == [6, 15, 53]
    for level in (1, 2, 3):
        assert len(set(classes(level))) == len(classes(level))


def test_every_secondary_class_has_its_parent_and_its_number_of_leaves() -> None:
    found = {
        class2: (class1, len(thirds))
        for class1, seconds in TAXONOMY.items()
        for class2, thirds in seconds.items()
    }
    assert found == SECONDARY


def test_parents_are_the_tree_read_upwards() -> None:
    assert set(PARENTS) == set(classes(3))
    for class1, seconds in TAXONOMY.items():
        for class2, thirds in seconds.items():
            for class3 in thirds:
                assert PARENTS[class3] == (class1, class2)


def test_keys_keep_the_real_sets_typos() -> None:
    for class3, parents in VERBATIM.items():
        assert PARENTS[class3] == parents


def test_display_mends_every_name_and_confuses_none() -> None:
    for level in (1, 2, 3):
        names = [display(c) for c in classes(level)]
        assert len(set(names)) == len(names)
        for name in names:
            assert name[0].isupper(), name
            assert not re.search(r"disablity|scamns|paypal|[a-z]Harms|  ", name), name
    assert display("disablity discrimination") == "Disability discrimination"
    assert display("Human Autonomy & IntegrityHarms") == "Human autonomy & integrity harms"
    assert display("theft") == "Theft"
    assert display("scamns") == "Scams"
