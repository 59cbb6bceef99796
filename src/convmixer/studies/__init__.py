"""Comparisons of models: one YAML file each, and the code that reads, matches, queues, runs and verifies them."""
