"""Files of ReDimNet's authors: what their tensors are called here, and the keys that their ``model_config`` says.

IDRnD/redimnet and PalabraAI/redimnet2 write ``{"model_config": arguments of their network, "state_dict": tensors}``.
"""

import re

from errors import UsageError, first_line

HEAD = (
    (r"(?:frontend\.)?spec\..*", None),  # constants of the features
    (r"projection\.(.*)", r"__L__.\1"),
    (r"bn\.(.*)", r"pool_bn.\1"),
    (r"linear\.(.*)", r"seg_1.\1"),
)
STAGE = r"backbone\.stage(\d+)(?:_pre)?"


def _last_sum(match, names) -> str:
    """Name the weights of the sum behind the last stage by how many stages there are."""
    stages = {found[1] for found in (re.fullmatch(STAGE + r"\.0\.w", name) for name in names) if found}
    return f"backbone.inputs_weights.{len(stages)}"


# The sums are the first layer of a stage there, the fold the second; here both are the backbone's.
RENAMES = (
    *HEAD,
    (r"backbone\.fin_wght1d\.w", _last_sum),
    (STAGE + r"\.0\.w", r"backbone.inputs_weights.\1"),
    (r"backbone\.mfa\.(.*)", r"backbone.head.\1"),
    (r"backbone\.head\.(weight|bias)", r"backbone.head.1.\1"),
    (r"backbone\.stem_gnorm\.(.*)", r"backbone.norms.0.\1"),
    *((rf"backbone\.stage{i}_up_2d\.\d+\.(.*)", rf"backbone.norms.{2 * i + 1}.\1") for i in range(8)),
    *((rf"backbone\.stage{i}_up_1d\.\d+\.(.*)", rf"backbone.norms.{2 * i + 2}.\1") for i in range(8)),
    (STAGE + r"\.2\.(weight|bias)", r"backbone.stage\1.0.\2"),
    *((rf"backbone\.stage{i}\.\d+\.(weight|bias)", rf"backbone.norms.{i + 1}.\1") for i in range(8)),
    *((STAGE + rf"\.{n}\.(.*)", rf"backbone.stage\1.{n - 2}.\2") for n in range(3, 20)),
)

# Arguments of their networks, and of their features, that have one value in every network here; None is left out.
SAME = {
    "block_1d_type": "conv+att",
    "fm_weigthing_type": "NC",
    "spec_in_channels": 1,
    "pooling_func": "ASTP",
    "compress_tconvs": True,
    "use_freq_pos_enc": False,
    "emb_bn": False,
    "tf_optimized_arch": False,
    "pad_right_samples": None,
    "before_pool_offset": None,
    "causal": "none",
    "num_classes": None,
}
SAME_SPEC = {"do_preemph": True, "spec_norm": "mn", "f_min": 20, "f_max": 7600, "n_fft": 512, "win_length": 400}
SAME_SPEC |= {"sample_rate": 16000, "eps": 1e-8}
FEATURES = {"pt": "redimnet", "pt_mel": "redimnet", "tf": "redimnet2", "tf_mel": "redimnet2"}


def keys_of(state: dict, path) -> dict:
    """The configuration keys of the network that a file's ``model_config`` describes; {} if it has none.

    UsageError names the argument of a network that cannot be built here.
    """
    given = state.get("model_config")
    if not isinstance(given, dict) or not isinstance(state.get("state_dict"), dict):
        return {}
    try:
        return _keys_of(given, path)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UsageError(f"{path}: its model_config is not one of ReDimNet's: {first_line(error)}") from error


def _keys_of(given: dict, path) -> dict:
    from models import ReDimNet, ReDimNet2

    second = "return_2d_output" in given or "agg_gnorm" in given
    sizes, default = (ReDimNet2.SIZES, "B3") if second else (ReDimNet.SIZES, "B2")
    blocks, group = ("basic_resnet", 1) if second else ("convnext_like", 4)  # their networks' own defaults
    keys = {"model": "ReDimNet2", "output_norm": bool(given.get("agg_gnorm")), "dual": bool(given.get("dual_agg"))}
    if not second:
        keys = {"model": "ReDimNet", "pooled_norm": True}
    spec = given.get("spec_params") or ({"norm_signal": True} if second else {})
    _refuse_others(
        {"block_1d_type": "conv+att" if second else "att", **given},
        {**SAME, "return_2d_output": True},
        "model_config",
        path,
    )
    _refuse_others(spec, SAME_SPEC, "model_config.spec_params", path)
    if given.get("feat_type", "pt") not in FEATURES:
        raise UsageError(f"{path}: model_config.feat_type: no features here are its '{given['feat_type']}'")
    if given.get("hop_length", 160) % 16:
        raise UsageError(f"{path}: model_config.hop_length: {given['hop_length']} samples are no whole ms")
    setup = given.get("stages_setup")
    if second and setup and given.get("block_2d_type", blocks) == "convnext_like":
        for i, stage in enumerate(setup):
            _refuse_others({"kernels": [list(k) for k in stage[3]]}, {"kernels": [[3, 3]]}, f"stages_setup[{i}]", path)
    built = ReDimNet.Size(
        int(given.get("C", 24 if second else 16)),
        given.get("block_2d_type", blocks),
        given.get("group_divisor", group),
        tuple(_stage(stage) for stage in setup) if setup else sizes[default].stages,
        given.get("out_channels") or 0,
    )
    bands, names = given.get("F", 72), [name for name, size in sizes.items() if _same(size, built)]
    if names:
        keys["size"] = names[0]
    else:
        keys |= {"channels": built.channels, "block": built.block, "group_size": built.group_size}
        keys |= {"stages": [list(stage) for stage in built.stages], "head_channels": built.head_channels}
    return {
        **keys,
        "nOut": given.get("embed_dim", 192),
        "n_mels": bands,
        "pooling": "ASTP_GLOB" if given.get("global_context_att", second) else "ASTP",
        "features": FEATURES[given.get("feat_type", "pt")],
        "frame_step": given.get("hop_length", 160) // 16,
        "wave_norm": bool(spec.get("norm_signal")),
        "input_norm": "mean",
    }


def _stage(given) -> tuple:
    """A stage as here, of theirs: (stride, blocks, expansion, kernels, reduction), the stride of ReDimNet2 a pair."""
    stride, blocks, expansion, _, reduction = given
    first, *time = stride if isinstance(stride, (list, tuple)) else (stride,)
    return (first, blocks, expansion, reduction or 0, *time)


def _same(a, b) -> bool:
    return vars(a) == vars(b)


def _refuse_others(given: dict, known: dict, place: str, path):
    """UsageError if an argument is given and is not what it is in every network here."""
    for name, value in given.items():
        if name in known and value != known[name] and value is not None and (value or known[name]):
            raise UsageError(f"{path}: {place}.{name}: no network here has {value!r}, but {known[name]!r}")
