"""CPU kernels for the ConvMixer block, shipped as source and built on first use."""
