"""Files: names, JSON descriptions, DuckDB files that appear whole or not at all, locks."""
