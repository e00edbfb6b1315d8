"""Harvests: running one, its blocks on disk, reading them again, and the loader that shuffles them."""
