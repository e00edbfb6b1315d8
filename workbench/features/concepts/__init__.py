"""Concepts: which features fire on what is known about tokens, beside probes that know it from the start."""
