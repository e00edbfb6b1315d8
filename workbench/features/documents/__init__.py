"""Documents by the features that fire in them: which are alike, what they share, and how well that finds a document."""
