"""The command `predict`: classifies files, folders, patterns, URLs, videos and a camera."""
