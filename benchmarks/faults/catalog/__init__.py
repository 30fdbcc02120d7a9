"""The faults, controls and compounds of the bench, in the order of their numbers.

``known_*`` holds the faults that the analysis was built on (F), ``heldout_*`` those it was not tuned on (H), each by
the part of a run in which they are, ``unseen_*`` those written by somebody who had not read it (N), ``plug_ins`` what
plug-ins bring with them (P), ``reported`` those of public trackers (R), and ``exam_*`` those
of another examiner who had not read it either (X). ``controls`` (C) are runs of which nothing
may be said, ``compounds`` (K) several faults at once.
`python benchmarks/faults/contents.py > benchmarks/faults/README.md` lists them all.
"""

import re

from catalog import (
    compounds,
    controls,
    exam_controls,
    exam_features,
    exam_layers,
    exam_losses,
    heldout_data,
    heldout_features,
    heldout_layers,
    heldout_losses,
    heldout_pooling,
    heldout_precision,
    heldout_training,
    known_data,
    known_layers,
    known_losses,
    known_training,
    plug_ins,
    reported,
    unseen_controls,
    unseen_features,
    unseen_layers,
    unseen_losses,
    unseen_pooling,
    unseen_precision,
    unseen_training,
)


def order(fault):
    """F before C before K before H before N before P before R before X, then by number and letter."""
    kind, number, letter = re.fullmatch(r"([FCKHNPRX])(\d+)([a-z]?)", fault.id).groups()
    return "FCKHNPRX".index(kind), int(number), letter


FILES = (
    known_data,
    known_layers,
    known_losses,
    known_training,
    heldout_data,
    heldout_features,
    heldout_pooling,
    heldout_layers,
    heldout_losses,
    heldout_precision,
    heldout_training,
    unseen_features,
    unseen_pooling,
    unseen_layers,
    unseen_losses,
    unseen_precision,
    unseen_training,
    plug_ins,
    reported,
    exam_features,
    exam_layers,
    exam_losses,
    controls,
    unseen_controls,
    exam_controls,
    compounds,
)
FAULTS = tuple(sorted((fault for file in FILES for fault in file.FAULTS), key=order))
