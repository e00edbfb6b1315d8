"""Analyses over a TransformerLens model: splicing into a forward pass, and weights as LayerNorm lets them be read."""
