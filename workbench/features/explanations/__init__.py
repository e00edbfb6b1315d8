"""Explanations of features by a language model, scored by whether they tell where features fire."""
