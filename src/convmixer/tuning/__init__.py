"""Searching settings on a validation split: `convmixer tune`."""
