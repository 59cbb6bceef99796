"""Exported models: one module per format, which writes, checks and reads it; `formats.py` lists them."""
