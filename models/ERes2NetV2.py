"""ERes2NetV2: models/ERes2Net.py in the size 26w 2s 2x, which fuses the last two stages only."""

from functools import partial

from models.ERes2Net import MainModel as ERes2Net

MainModel = partial(ERes2Net, size="V2")
