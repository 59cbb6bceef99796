"""The command `predict`: files, folders, patterns, URLs, videos and a camera in; classes, tables and pictures out."""
