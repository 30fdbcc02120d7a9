"""ResNet34 of wespeaker: models/ResNet.py with basic blocks [3, 4, 6, 3]."""

from functools import partial

from models.ResNet import MainModel as ResNet

MainModel = partial(ResNet, depth=34)
