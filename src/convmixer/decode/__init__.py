"""Decodes untrusted image files, with bounds on time and memory."""
