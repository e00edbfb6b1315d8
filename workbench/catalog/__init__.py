"""What lies in a workspace and what it was made from: artefacts, results, runs, notes, SQL, removal."""
