"""SAEs of a workspace: training and sweeps, evaluation, comparison, import and export."""
