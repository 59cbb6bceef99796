"""Records and run folders in; tables, plots, verdicts and reports out. Reads files, never a model."""
