"""ConvMixer-768/32 on ImageNet-1k in 300 epochs: the settings of paper-imagenet for twice as long.

    torchrun --nproc-per-node 10 -m convmixer train IMAGENET_FOLDER --recipe paper-imagenet-300

Expected: 80.16% top-1 of the ImageNet validation set is what the released weights reach; the authors needed about
8 days on 10 RTX 8000 (issue #12 of github.com/locuslab/convmixer). The paper says GELU, those weights use ReLU,
and so does this model; `--act gelu` is the paper's text.
"""

import dataclasses

from convmixer.config import Config
from convmixer.recipes import paper_imagenet


def config() -> Config:
    """Return the settings."""
    return dataclasses.replace(paper_imagenet.config(), model="convmixer_768_32", epochs=300)
