"""Text: corpora, the bundled corpus of Python source, and packing documents into contexts."""
