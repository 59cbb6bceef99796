"""Speed and memory of this package's kernels beside its peers, measured side by side on the machine it runs on."""
