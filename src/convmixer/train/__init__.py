"""Training: config in, run folder out."""
