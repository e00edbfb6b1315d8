"""Models: loading, hook points, capture of activations, prompts as tokens, contexts with their losses."""
