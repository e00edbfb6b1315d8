"""Features: the index, concepts, explanations, prompts and steering."""
