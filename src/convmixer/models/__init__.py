"""Models: the paper's ConvMixer, the models that it is compared with, their names, and their weights."""
