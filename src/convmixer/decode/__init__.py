"""Decodes untrusted image files, with limits on time and memory."""
