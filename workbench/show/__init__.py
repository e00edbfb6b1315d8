"""What a person sees: progress bars, HTML primitives, colours. The lowest room: it knows no artefact."""
