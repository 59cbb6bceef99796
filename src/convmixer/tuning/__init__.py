"""Hyperparameter search on a validation split: `convmixer tune`."""
