"""Studies, which compare models: one YAML file per study, and the code that plans, runs and verifies them."""
