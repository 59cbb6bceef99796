"""Models: the paper's ConvMixer, the registry that names its variants, and the weights they load."""
