"""ConvMixer-768/32 on ImageNet-1k in 300 epochs: the settings of paper-imagenet for twice as long.

    torchrun --nproc-per-node 10 -m convmixer train IMAGENET_FOLDER --recipe paper-imagenet-300

Expected: the released weights reach 80.16% top-1 on the ImageNet validation set; the authors needed about 8 days on
10 RTX 8000 (issue #12 of github.com/locuslab/convmixer). The paper says GELU, but those weights use ReLU, and so does
this model; `--act gelu` follows the paper.
"""

import dataclasses

from convmixer.config import Config
from convmixer.recipes import paper_imagenet


def config() -> Config:
    """Return the settings."""
    return dataclasses.replace(paper_imagenet.config(), model="convmixer_768_32", epochs=300)
