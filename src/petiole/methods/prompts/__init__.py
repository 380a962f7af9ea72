"""Prompt, prefix and visual prompts and their kin: changes of what goes into the model or its attention."""
