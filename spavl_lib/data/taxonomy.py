"""SPA-VL's harm taxonomy: 6 primary, 15 secondary, 53 tertiary classes.

Keys are the strings of the data set, including its typos and missing spaces. `display` corrects
them for readers. (The paper's abstract counts 13 secondary classes, but the data and section 3.1 of
the paper have 15.)
"""

TAXONOMY: dict[str, dict[str, tuple[str, ...]]] = {
    "Representation & ToxicityHarms": {
        "Toxic": ("bully", "harass", "hate", "insult", "terrorism", "threaten", "violent"),
        "Unfair": (
            "ageism",
            "disablity discrimination",
            "geographical discrimination",
            "racial",
            "religion",
            "sexism",
        ),
    },
    "Misinformation Harms": {
        "Erosion of trust in public information": ("illegal drugs", "medical"),
        "false beliefs": ("fake science", "historical revisionism", "radicalization"),
    },
    "Information & Safety Harms": {
        "dangerous information": ("financial data", "government secret"),
        "Privacy": ("personal privacy",),
    },
    "Malicious Use": {
        "Security threats": ("biological and chemical harms", "cyber", "malware", "weapon"),
        "Defamation": ("defamation",),
        "Fraud or deceptive action": (
            "academic dishonesty",
            "disinformation",
            "fake news",
            "financial fraud",
            "pseudo-pharmaceuticals",
            "rumors",
            "scamns",
            "spam information",
        ),
        "Influence operations": (
            "campaign materials",
            "illegitimate surveillance",
            "manipulation of public opinion",
        ),
        "Illegal activities": (
            "drug-related crimes",
            "environmental crimes",
            "financial crimes",
            "illegal law advice",
            "theft",
            "traffic and driving offenses",
        ),
    },
    "Human Autonomy & IntegrityHarms": {
        "Persuasion and manipulation": ("physical harm", "psychological manipulation"),
        "Violation of personal property": (
            "copyright infringement",
            "forge identity",
            "plagiarism",
        ),
    },
    "Socioeconomic Harms": {
        "Risky financial practices": ("gamble", "multi-level marketing", "paypal lending"),
        "Trade and compliance": ("labor issues", "trade affairs"),
    },
}

# class3 -> (class1, class2)
PARENTS: dict[str, tuple[str, str]] = {
    class3: (class1, class2)
    for class1, seconds in TAXONOMY.items()
    for class2, thirds in seconds.items()
    for class3 in thirds
}

_DISPLAY = {
    "Representation & ToxicityHarms": "Representation & toxicity harms",
    "Misinformation Harms": "Misinformation harms",
    "Information & Safety Harms": "Information & safety harms",
    "Malicious Use": "Malicious use",
    "Human Autonomy & IntegrityHarms": "Human autonomy & integrity harms",
    "Socioeconomic Harms": "Socioeconomic harms",
    "disablity discrimination": "Disability discrimination",
    "scamns": "Scams",
    "paypal lending": "Predatory lending",
}
# Question type -> its name for readers.
QUESTION_TYPES = {
    "easy": "direct question",
    "hardq": "question with a pretext",
    "hards": "demand or plan",
}
# Field of a row -> its name for readers.
_FIELDS = {
    "class1": "class of harm, level 1",
    "class2": "class of harm, level 2",
    "class3": "class of harm",
    "question_type": "question type",
    "image_name": "image file",
    "harmful": "harmful with this image",
}


def field_name(field: str) -> str:
    """A field of a row for readers: in words, without underscores."""
    return _FIELDS.get(field, field.replace("_", " "))


def display(name: str) -> str:
    """A class or question type for readers: typos corrected, with a capital first letter."""
    name = QUESTION_TYPES.get(name, name)
    return _DISPLAY.get(name, name[:1].upper() + name[1:])


def classes(level: int) -> tuple[str, ...]:
    """All classes of level 1, 2 or 3, in the taxonomy's order."""
    if level == 1:
        return tuple(TAXONOMY)
    if level == 2:
        return tuple(c for seconds in TAXONOMY.values() for c in seconds)
    return tuple(PARENTS)
