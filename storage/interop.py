"""Checkpoints of other toolkits: whose file it is by the names of its tensors, and what those are called here."""

import re
from dataclasses import dataclass

import torch

from storage import redimnet, upstreams


@dataclass(frozen=True)
class Toolkit:
    """How one project names its tensors. Renames are tried in order, the first that matches counts.

    A replacement is a template, a function of (match, names of the file), or None: a constant that is made here.
    """

    name: str
    marks: tuple  # groups of names; a file that holds all of one group is of this project
    features: tuple  # the feature chains its weights were trained with
    renames: tuple = ()  # (pattern, replacement)
    rolls: tuple = ()  # (pattern of the name here, axis): an eighth of the channels goes from the front to the end
    part: str = ""  # begin of the names here if such a file is a part of a model; the rest then starts fresh
    optional: str = ""  # pattern of names of that part which a file may lack
    spare: str = ""  # pattern of the begin of names which a model may be without

    def needs(self, name: str) -> bool:
        """Whether a file must hold the tensor that a model here names so."""
        name = name.removeprefix("__S__.")
        return name.startswith(self.part) and not (self.optional and re.fullmatch(self.optional, name))

    def spares(self, name: str, own) -> bool:
        """Whether a tensor of a file is of a layer that a model whose tensors are ``own`` is made without."""
        layer = re.match(self.spare, name.removeprefix("__S__.")) if self.spare else None
        return layer is not None and not any(mine.startswith("__S__." + layer[0]) for mine in own)


CLASSIFIER = (r"projection\.(.*)", r"__L__.\1")
BLOCK = r"layer\1.layers."

TOOLKITS = (
    Toolkit(
        "voxceleb_trainer",
        (
            ("sap_linear.weight", "attention", "fc.weight"),
            ("attention.0.weight", "layer1.0.se.fc.0.weight"),
            ("netcnn.0.weight", "fc.weight"),
        ),
        ("voxceleb_trainer",),
        (
            (r"torchfb\.0\.flipped_filter", "frontend.preemphasis.flipped_filter"),
            (r"torchfb\..*", None),
            (r"netcnn\.(.*)", r"layers.\1"),
            (r"sap_linear\.(.*)", r"pooling.linear.\1"),
            (r"attention(.*)", r"pooling.attention\1"),
        ),
    ),
    Toolkit(
        "TaoRuijie/ECAPA-TDNN",
        (("fc6.weight", "attention.4.weight", "bn6.weight"),),
        ("taoruijie",),
        (
            (r"torchfbank\..*", None),
            (r"speaker_loss\.weight", "__L__.weight"),
            (r"conv1\.(.*)", r"layer1.conv.\1"),
            (r"bn1\.(.*)", r"layer1.bn.\1"),
            (r"layer4\.(.*)", r"conv.\1"),
            (r"attention\.0\.(.*)", r"pool.linear1.\1"),
            (r"attention\.2\.(.*)", r"pool.norm.1.\1"),
            (r"attention\.4\.(.*)", r"pool.linear2.\1"),
            (r"bn5\.(.*)", r"bn.\1"),
            (r"fc6\.(.*)", r"linear.\1"),
            (r"bn6\.(.*)", r"bn_output.\1"),
            *(
                (rf"layer{i}\.{theirs}\.(.*)", rf"layer{i + 1}.layers.{ours}.\1")
                for i in (1, 2, 3)
                for theirs, ours in (
                    ("conv1", "0.conv"),
                    ("bn1", "0.bn"),
                    ("conv3", "2.conv"),
                    ("bn3", "2.bn"),
                    (r"se\.se\.1", "3.linear1"),
                    (r"se\.se\.3", "3.linear2"),
                )
            ),
            *((rf"layer{i}\.convs\.(\d)\.(.*)", rf"layer{i + 1}.layers.1.parts.\1.conv.\2") for i in (1, 2, 3)),
            *((rf"layer{i}\.bns\.(\d)\.(.*)", rf"layer{i + 1}.layers.1.parts.\1.bn.\2") for i in (1, 2, 3)),
        ),
    ),
    Toolkit(
        "SpeechBrain or 3D-Speaker",  # whose ECAPA-TDNN is SpeechBrain's
        (("blocks.0.conv.conv.weight", "asp.tdnn.conv.conv.weight"),),
        ("speechbrain", "3dspeaker"),
        (
            (r"blocks\.0\.conv\.conv\.(.*)", r"layer1.conv.\1"),
            (r"blocks\.0\.norm\.norm\.(.*)", r"layer1.bn.\1"),
            (r"mfa\.conv\.conv\.(.*)", r"conv.\1"),
            (r"mfa\.norm\.norm\.(.*)", r"bn_aggregate.\1"),
            (r"asp\.tdnn\.conv\.conv\.(.*)", r"pool.linear1.\1"),
            (r"asp\.tdnn\.norm\.norm\.(.*)", r"pool.norm.1.\1"),
            (r"asp\.conv\.conv\.(.*)", r"pool.linear2.\1"),
            (r"asp_bn\.norm\.(.*)", r"bn.\1"),
            (r"fc\.conv\.(.*)", r"linear.\1"),
            *(
                (rf"blocks\.{i}\.{theirs}\.(.*)", rf"layer{i + 1}.layers.{ours}.\1")
                for i in (1, 2, 3)
                for theirs, ours in (
                    (r"tdnn1\.conv\.conv", "0.conv"),
                    (r"tdnn1\.norm\.norm", "0.bn"),
                    (r"tdnn2\.conv\.conv", "2.conv"),
                    (r"tdnn2\.norm\.norm", "2.bn"),
                    (r"se_block\.conv1\.conv", "3.linear1"),
                    (r"se_block\.conv2\.conv", "3.linear2"),
                )
            ),
            *(
                (
                    rf"blocks\.{i}\.res2net_block\.blocks\.(\d)\.{theirs}\.(.*)",
                    rf"layer{i + 1}.layers.1.parts.\1.{ours}.\2",
                )
                for i in (1, 2, 3)
                for theirs, ours in ((r"conv\.conv", "conv"), (r"norm\.norm", "bn"))
            ),
        ),
        # Its Res2Net convolution passes the first channel group on as it is, ours the last.
        ((r"layer[234]\.layers\.0\..*", 0), (r"layer[234]\.layers\.2\.conv\.weight", 1)),
    ),
    Toolkit(
        "wespeaker",
        (("layer2.se_res2block.0.conv.weight",),),
        ("wespeaker",),
        (
            CLASSIFIER,
            (r"layer(\d)\.se_res2block\.1\.convs\.(\d)\.(.*)", BLOCK + r"1.parts.\2.conv.\3"),
            (r"layer(\d)\.se_res2block\.1\.bns\.(\d)\.(.*)", BLOCK + r"1.parts.\2.bn.\3"),
            (r"layer(\d)\.se_res2block\.(.*)", BLOCK + r"\2"),
        ),
    ),
    Toolkit(
        "RawNet3",  # Jungjee/RawNet and voxceleb_trainer
        (("conv1.filterbank.low_hz_", "attention.3.weight"),),
        (),
        (
            (r"conv1\.filterbank\.(low_hz|band_hz)_", r"conv1.\1"),
            (r"conv1\.filterbank\..*", None),
            (r"bn[16]\..*", None),  # in the file, but the published model passes nothing through them
            (r"layer(\d)\.(conv|bn)1\.(.*)", BLOCK + r"0.\2.\3"),
            (r"layer(\d)\.(conv|bn)s\.(\d)\.(.*)", BLOCK + r"1.parts.\3.\2.\4"),
            (r"layer(\d)\.(conv|bn)3\.(.*)", BLOCK + r"2.\2.\3"),
            (r"layer(\d)\.residual\.0\.weight", r"layer\1.residual.weight"),
        ),
    ),
    Toolkit(
        "wespeaker",  # whose ERes2Net has the first convolution of a fused block by a name of its own
        (("layer3.0.conv2_1.weight", "seg_1.weight"),),
        ("wespeaker",),
        (
            CLASSIFIER,
            (r"(layer[34]\.\d+)\.conv2_1\.(.*)", r"\1.convs.0.\2"),
            (r"(layer[34]\.\d+)\.bn2_1\.(.*)", r"\1.bns.0.\2"),
            (r"(layer[34]\.\d+\.(?:convs|bns))\.0\.(.*)", r"\1.1.\2"),
        ),
    ),
    Toolkit(
        "ReDimNet or ReDimNet2",  # the authors', and wespeaker's ReDimNet2
        (("backbone.fin_wght1d.w", "linear.weight"),),
        ("redimnet", "redimnet2"),
        redimnet.RENAMES,
    ),
    Toolkit(  # as they were before November 2024: the sums are the backbone's, as here
        "ReDimNet or ReDimNet2",
        (("backbone.inputs_weights.0", "bn.weight", "linear.weight"),),
        ("redimnet",),
        redimnet.HEAD,
    ),
    Toolkit(
        "WavLM, HuBERT or wav2vec 2.0",
        upstreams.MARKS,
        (),
        upstreams.RENAMES,
        part=upstreams.PART,
        optional=upstreams.OPTIONAL,
        spare=upstreams.SPARE,
    ),
    # Their names are kept in models/; only the classifier is renamed.
    Toolkit(
        "wespeaker or 3D-Speaker",
        (
            ("seg_1.weight", "layer1.0.conv1.weight"),
            ("xvector.tdnn.linear.weight",),
            ("frame_1.conv_1d.weight", "seg_1.weight"),
            ("backbone.inputs_weights.0",),
            ("bottleneck.weight", "front.conv1.weight"),
        ),
        ("wespeaker", "3dspeaker"),
        (CLASSIFIER,),
    ),
)

OUTER = ("__S__.", "speaker_encoder.", "speaker_extractor.", "embedding_model.", *upstreams.OUTER)


def recognise(names) -> Toolkit | None:
    """Which project a file is of, by the names of its tensors; None for our own."""
    bare = {_without(name, OUTER) for name in names}
    own = any(name.startswith("__S__.") for name in names)
    for toolkit in TOOLKITS:
        if any(set(group) <= bare for group in toolkit.marks):
            return None if own and toolkit is TOOLKITS[-1] else toolkit
    return None


def translate(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors of a recognised project the names (and the channel order) that they have here."""
    toolkit = recognise(weights)
    if toolkit is None:
        return weights
    found, names = {}, [_without(name, OUTER) for name in weights]
    for name, tensor in weights.items():
        name = _renamed(_without(name, OUTER), toolkit, names)
        if name is not None:
            found[name] = _rolled(name, tensor, toolkit)
    return found


def _without(name: str, prefixes) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def _renamed(name: str, toolkit: Toolkit, names: list[str]) -> str | None:
    for pattern, replacement in toolkit.renames:
        match = re.fullmatch(pattern, name)
        if match:
            if callable(replacement):
                return replacement(match, names)
            return None if replacement is None else match.expand(replacement)
    return name


def _rolled(name: str, tensor: torch.Tensor, toolkit: Toolkit) -> torch.Tensor:
    for pattern, axis in toolkit.rolls:
        if re.fullmatch(pattern, name) and tensor.dim() > axis:
            return tensor.roll(-(tensor.shape[axis] // 8), dims=axis)
    return tensor
