"""ResNetSE34L, the 1.4 M parameter model of voxceleb_trainer (Chung et al. 2020, "In defence of metric learning")."""

from torch import nn

from models.frontend import FrontEnd
from models.pooling import ASP, SAP
from models.ResNetBlocks import SEBasicBlock, init_convolutions, make_stage


class ResNetSE34L(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    channels_last = True

    def __init__(self, nOut, encoder_type, num_filters, frontend):
        super().__init__()
        if encoder_type not in ("SAP", "ASP"):
            raise ValueError(f"encoder_type: must be SAP or ASP, got '{encoder_type}'")
        self.frontend = frontend
        c1, c2, c3, c4 = num_filters
        self.conv1 = nn.Conv2d(1, c1, 7, stride=(2, 1), padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = make_stage(SEBasicBlock, c1, c1, 3, 1)
        self.layer2 = make_stage(SEBasicBlock, c1, c2, 4, (2, 2))
        self.layer3 = make_stage(SEBasicBlock, c2, c3, 6, (2, 2))
        self.layer4 = make_stage(SEBasicBlock, c3, c4, 3, 1)
        self.pooling = (SAP if encoder_type == "SAP" else ASP)(c4)
        self.fc = nn.Linear(c4 * (1 if encoder_type == "SAP" else 2), nOut)
        init_convolutions(self)

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def forward(self, x):
        x = self.frontend(x).unsqueeze(1)  # (B, 1, mels, frames)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pooling(x.mean(dim=2)))


def MainModel(
    nOut=256,
    encoder_type="SAP",
    n_mels=40,
    log_input=True,
    num_filters=(16, 32, 64, 128),
    input_norm="meanvar",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model; ``encoder_type`` SAP or ASP."""
    frontend = FrontEnd(
        "voxceleb_trainer",
        n_mels,
        input_norm,
        log_input,
        False,
        tuple(spec_augment),
        sample_rate=sample_rate,
        plugin=frontend,
    )
    return ResNetSE34L(nOut, encoder_type, tuple(num_filters), frontend)
