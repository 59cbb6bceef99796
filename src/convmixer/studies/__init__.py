"""One YAML file per comparison."""
