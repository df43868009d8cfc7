"""Frozen configuration: sections, presets of the original code, and strict profiles."""

from spavl_lib.config.sections import *  # noqa: F403
