"""Image sets from disk, their transforms, and which image comes at which step."""
