"""One HTTP server and its page."""
