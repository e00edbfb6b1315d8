"""The feature index: what every feature of an SAE does on a harvest, in one DuckDB file the app reads.

build.py      makes it, by way of segments, statistics, examples, coactivation, geometry, logits, tables
query.py      reads it: FeatureIndex
feature.py    what a reading gives: Feature; page.py draws it as HTML, figures.py as Plotly figures
on_text.py    a feature on a text of one's own
"""
