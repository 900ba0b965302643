"""Small sets of texts to measure on, written for this package and under its licence."""

import json
from pathlib import Path

_TEXTS = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))

# A fine-tune practises on these,
INSTRUCTIONS: tuple[str, ...] = tuple(_TEXTS["instructions"])
# and is checked on these: none of them is practised.
HELD_OUT_INSTRUCTIONS: tuple[str, ...] = tuple(_TEXTS["held_out_instructions"])
# `side_effects` and `reach` compare with these.
UNRELATED_PROMPTS = HELD_OUT_INSTRUCTIONS
# Prose of several kinds, to measure what a vector costs where nobody asked for it.
PASSAGES: tuple[str, ...] = tuple(_TEXTS["passages"])
