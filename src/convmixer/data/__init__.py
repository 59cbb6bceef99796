"""Finds, reads, splits and augments images, and decides which image comes at which step."""
