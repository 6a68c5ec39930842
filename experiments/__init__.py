"""What a run does: command line, data, dequantization, training, checkpoints, metrics, comparison, figures, report."""
