"""`convmixer serve`: an HTTP server for one model, and its web page."""
