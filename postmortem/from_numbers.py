"""What to look at for a dump without weights and configuration, by what its numbers show; none of it is tried."""

import math

LARGE = 100.0  # far above a waveform, -1 to 1, and above features
LOWER_LR = ("lower the learning rate, as to 0.0005 from 0.001", "set", {"lr": 0.0005})
SOUNDS = ("check the augmentation: the recordings below musan_path and rir_path", "none", None)


def advice(dump: dict, cause: str) -> list[tuple]:
    """(text, action, change) of each thing to look at; ``cause`` is that of the diagnosis."""
    data = dump["data"].float()
    finite = data[data.isfinite()]
    if cause == "label":
        return [
            ("check that nClasses fits the data set; 0 counts the speakers of train_list", "set", {"nClasses": 0}),
            ("check the speakers of train_list, in whose order labels are numbered", "none", None),
        ]
    if cause == "input":
        return [
            ("check the audio files for damage: trainSpeakerNet.py --preflight reads them all", "none", None),
            SOUNDS,
            ("check how audio is read, if DatasetLoader.py was changed", "none", None),
        ]
    if finite.numel() and float(finite.abs().max()) > LARGE:
        return [("normalise the input: a waveform lies between -1 and 1", "none", None), LOWER_LR, SOUNDS]
    if math.isfinite(dump["loss"]):
        return []
    return [
        LOWER_LR,
        ("lower the scale of the loss, as to 20 from 30", "set", {"scale": 20}),
        ("switch mixed precision off", "set", {"mixedprec": False}),
        ("lower the margin, as to 0.1 from 0.2", "set", {"margin": 0.1}),
        ("clip gradients harder, as at 1 where it is 5", "set", {"grad_clip": 1.0}),
    ]
