"""Comparisons of models: one YAML file each, and what reads, matches, queues, runs and verifies them."""
