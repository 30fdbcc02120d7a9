"""ResNetSE34V2, the 8 M parameter model of voxceleb_trainer (Heo et al. 2020, "Clova baseline system")."""

from torch import nn

from models.frontend import FrontEnd
from models.pooling import ChannelAttention
from models.ResNetBlocks import SEBasicBlock, init_convolutions, make_stage


class ResNetSE34V2(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut); pre-emphasis and a ReLU-then-BN stem."""

    channels_last = True

    def __init__(self, nOut, encoder_type, n_mels, num_filters, frontend):
        super().__init__()
        if encoder_type not in ("SAP", "ASP"):
            raise ValueError(f"encoder_type: must be SAP or ASP, got '{encoder_type}'")
        self.frontend = frontend
        c1, c2, c3, c4 = num_filters
        self.conv1 = nn.Conv2d(1, c1, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = make_stage(SEBasicBlock, c1, c1, 3, 1)
        self.layer2 = make_stage(SEBasicBlock, c1, c2, 4, (2, 2))
        self.layer3 = make_stage(SEBasicBlock, c2, c3, 6, (2, 2))
        self.layer4 = make_stage(SEBasicBlock, c3, c4, 3, (2, 2))
        channels = c4 * (n_mels // 8)
        self.pooling = ChannelAttention(channels, statistics=encoder_type == "ASP")
        self.fc = nn.Linear(channels * (2 if encoder_type == "ASP" else 1), nOut)
        init_convolutions(self)

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def forward(self, x):
        x = self.frontend(x).unsqueeze(1)  # (B, 1, mels, frames)
        x = self.bn1(self.relu(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pooling(x.flatten(1, 2)))


def MainModel(
    nOut=512,
    encoder_type="ASP",
    n_mels=64,
    log_input=True,
    num_filters=(32, 64, 128, 256),
    input_norm="meanvar",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model; ``n_mels`` is a multiple of 8, ``encoder_type`` SAP or ASP."""
    if n_mels % 8:
        raise ValueError(f"n_mels: ResNetSE34V2 needs a multiple of 8, got {n_mels}")
    frontend = FrontEnd(
        "voxceleb_trainer",
        n_mels,
        input_norm,
        log_input,
        True,
        tuple(spec_augment),
        sample_rate=sample_rate,
        plugin=frontend,
    )
    return ResNetSE34V2(nOut, encoder_type, n_mels, tuple(num_filters), frontend)
