"""Image files of strangers to pixels, with bounds on time and memory."""
