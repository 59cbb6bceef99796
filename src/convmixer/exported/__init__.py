"""Exported models: one file per format, which is written, checked and read there; `formats.py` lists them."""
