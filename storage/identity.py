"""Which model made an embedding: models of one identity share an embedding space."""

import hashlib
import json

from config import KEYS, Config
from settings import plugins
from settings.carried import LATER, keys_of_front_end, keys_of_training


def identity_of(weights: dict, config: Config) -> str:
    """SHA-256 over the model's ``weights`` {name: tensor} and keys: models with the same one share an embedding space.

    Weights of a loss (``__L__.``) play no part.
    """
    import torch  # not for --help

    digest = hashlib.sha256()
    model = plugins.known_declaration("models", config.model)
    own = {*model.own, *keys_of_front_end(config.values(), model)} - keys_of_training(config.values(), model)
    keys = {name: getattr(config, name) for name in own if hasattr(config, name)}
    keys = {name: value for name, value in keys.items() if name not in LATER or value != KEYS[name].default}
    digest.update(json.dumps({"model": config.model, **keys}, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        if not name.startswith("__L__.") and not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()
