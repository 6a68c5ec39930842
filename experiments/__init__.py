"""What a run does: command line, data, training, checkpoints, comparison, likelihood, figures, report."""
