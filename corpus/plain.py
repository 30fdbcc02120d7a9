"""Values as files hold them: the numbers of numpy as those of Python."""

import numpy as np

SCALARS = frozenset((str, int, float, bool, type(None)))  # of Python, and what most values of a draw are


def plain(value):
    """A nested value with the numbers of numpy in it as Python's and its arrays as tensors; itself if it has none.

    A plug-in may compute a learning rate or a draw with numpy. torch.save writes such a number as an object, which
    restricted loading refuses: the whole file would be lost.
    """
    if type(value) in SCALARS:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        import torch  # most who import this do without

        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        if SCALARS.issuperset(map(type, value)) and SCALARS.issuperset(map(type, value.values())):
            return value
        found = {plain(key): plain(item) for key, item in value.items()}
        same = all(a is b and x is y for (a, x), (b, y) in zip(value.items(), found.items()))
        return value if same else found
    if type(value) in (list, tuple):
        items = [plain(item) for item in value]
        return value if all(a is b for a, b in zip(value, items)) else type(value)(items)
    return value
