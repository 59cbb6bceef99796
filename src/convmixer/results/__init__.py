"""Makes tables, plots, verdicts and reports from records and run folders. No model is loaded here."""
