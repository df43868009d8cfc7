"""Names of evaluation sets. `help_twemoji` is the set `help` with drawings in the style Twemoji."""

UNSEEN = "twemoji"  # no model is trained on this style; measured once, at the end
CHOSEN_ON = "fluent_hc"  # no model is trained on this one either; settings are chosen on it


def set_parts(name: str) -> tuple[str, str]:
    """Divide an evaluation set's name into the set, and the unseen style of its drawings.

    Args:
        name: Such as `help` or `help_twemoji`.

    Returns:
        The name without the style, and the style; it is empty if models are trained on the
        drawings.
    """
    for style in (UNSEEN, CHOSEN_ON):
        if name.endswith(f"_{style}"):
            return name.removesuffix(f"_{style}"), style
    return name, ""
