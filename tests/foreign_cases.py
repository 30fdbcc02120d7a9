"""Checkpoints of all other toolkits that are read: each case gives a file, its keys, and what embeds as they do."""

import foreign_models
import foreign_redimnet
import foreign_res2net
import foreign_tdnn

CASES = [*foreign_models.CASES, *foreign_tdnn.CASES, *foreign_redimnet.CASES, *foreign_res2net.CASES]
