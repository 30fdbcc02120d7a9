"""The models in the settings they are published in: keys, parameters, and error rates with their source.

``parameters`` counts the toolkit's own model (its classifier left out), ``published`` is what its authors print.
EERs in % are on VoxCeleb1-O, E and H (cleaned) after training on VoxCeleb2-dev, scored by cosine without AS-norm, where
``condition`` says no more. "LM" is a second stage on 6 s crops with a larger margin.
"""

from dataclasses import dataclass

SOURCES = {
    "wespeaker": "https://github.com/wenet-e2e/wespeaker/tree/master/examples/voxceleb/v2",
    "3D-Speaker": "https://github.com/modelscope/3D-Speaker",
    "SpeechBrain": "https://github.com/speechbrain/speechbrain/tree/develop/recipes/VoxCeleb/SpeakerRec",
    "voxceleb_trainer": "https://github.com/clovaai/voxceleb_trainer",
    "TaoRuijie": "https://github.com/TaoRuijie/ECAPA-TDNN",
    "ReDimNet": "https://github.com/IDRnD/ReDimNet/blob/master/EVALUATION.md",
    "ReDimNet2": "https://github.com/PalabraAI/redimnet2",
}


@dataclass(frozen=True)
class Setting:
    """A row of the table; one without ``source``, whose setting it is, is counted but not timed."""

    name: str
    model: str
    keys: dict
    parameters: int
    published: str = ""
    eer: str = ""
    source: str = ""
    condition: str = ""


CROPS = "mean of 10 x 4 s crops"
VOXBLINK = "VoxBlink2 too, LM, AS-norm, QMF"
LARGE_ECAPA = {"channels": 1024, "aggregate": 3072, "layout": "speechbrain"}
SE34L = {"n_mels": 40, "log_input": True}
SE34V2 = {"nOut": 512, "log_input": True}

SETTINGS = (
    Setting(
        "ResNetSE34L",
        "ResNetSE34L",
        {**SE34L, "nOut": 512, "encoder_type": "SAP"},
        1_437_078,
        "1.4M",
        "2.179 / - / -",
        "voxceleb_trainer",
        CROPS,
    ),
    Setting(
        "ResNetSE34V2",
        "ResNetSE34V2",
        {**SE34V2, "n_mels": 64, "encoder_type": "ASP"},
        8_028_492,
        "8.0M",
        "1.018 / - / -",
        "voxceleb_trainer",
        CROPS,
    ),
    Setting(
        "VGGVox",
        "VGGVox",
        {"nOut": 1024, "n_mels": 40, "log_input": True, "encoder_type": "SAP"},
        4_295_104,
        "",
        "-",
        "voxceleb_trainer",
    ),
    Setting("x-vector", "XVector", {"nOut": 512}, 4_610_524, "4.61M", "1.989 / 1.950 / 3.412", "wespeaker"),
    Setting(
        "ECAPA-TDNN 512", "ECAPA_TDNN", {"channels": 512}, 6_190_720, "6.19M", "1.069 / 1.209 / 2.310", "wespeaker"
    ),
    Setting(
        "ECAPA-TDNN 1024",
        "ECAPA_TDNN",
        {"channels": 1024},
        14_657_088,
        "14.65M",
        "0.856 / 1.072 / 2.059",
        "wespeaker",
    ),
    Setting(
        "ECAPA-TDNN 1024, 3072",
        "ECAPA_TDNN",
        {**LARGE_ECAPA, "features": "3dspeaker"},
        20_767_552,
        "20.8M",
        "0.86 / 0.97 / 1.90",
        "3D-Speaker",
    ),
    Setting(
        "ECAPA-TDNN 1024, sums",
        "ECAPA_TDNN",
        {"channels": 1024, "layout": "taoruijie", "features": "taoruijie"},
        15_444_544,
        "14.73M",
        "0.96 / - / -",
        "TaoRuijie",
        "whole file and 5 x 3 s",
    ),
    Setting("ResNet34", "ResNet", {"depth": 34}, 6_634_336, "6.63M", "0.867 / 1.049 / 1.959", "wespeaker"),
    Setting("ResNet221", "ResNet", {"depth": 221}, 23_792_224, "23.79M", "0.569 / 0.774 / 1.464", "wespeaker"),
    Setting("ResNet293", "ResNet", {"depth": 293}, 28_626_016, "28.62M", "0.595 / 0.756 / 1.433", "wespeaker"),
    Setting("CAM++ 512", "CAMPPlus", {"nOut": 512}, 7_176_224, "7.18M", "0.803 / 0.932 / 1.860", "wespeaker"),
    Setting(
        "CAM++ 512, 3D-Speaker",
        "CAMPPlus",
        {"nOut": 512, "features": "3dspeaker"},
        7_176_224,
        "7.2M",
        "0.73 / 0.89 / 1.76",
        "3D-Speaker",
    ),
    Setting("ERes2Net base", "ERes2Net", {"size": "base"}, 6_610_688, "6.61M", "0.96 / 1.06 / 1.96", "3D-Speaker"),
    Setting(
        "ERes2Net large", "ERes2Net", {"size": "large"}, 22_462_784, "22.46M", "0.52 / 0.75 / 1.44", "3D-Speaker", "LM"
    ),
    Setting("ERes2NetV2", "ERes2NetV2", {}, 17_859_632, "17.8M", "0.61 / 0.76 / 1.45", "3D-Speaker", "LM"),
    *(
        Setting(
            f"SimAM-ResNet{depth}",
            "SimAM_ResNet",
            {"depth": depth},
            parameters,
            published,
            eer,
            "wespeaker",
            VOXBLINK,
        )
        for depth, parameters, published, eer in (
            (34, 25_213_760, "25.2M", "0.372 / 0.559 / 0.997"),
            (100, 50_232_896, "50.2M", "0.202 / 0.421 / 0.795"),
        )
    ),
    # The authors' file has 1,024 more, of two BNs that nothing passes through.
    Setting("RawNet3", "RawNet3", {"nOut": 256}, 16_279_298, "16.3M", "0.893 / - / -", "voxceleb_trainer", CROPS),
    *(
        Setting(
            f"ReDimNet-{size}",
            "ReDimNet",
            {"size": size, "n_mels": 60 if size == "B0" else 72},
            parameters,
            published,
            eer,
            "ReDimNet",
            "LM, 15 ms steps",
        )
        for size, parameters, published, eer in (
            ("B0", 1_001_851, "1.0M", "1.16 / 1.25 / 2.20"),
            ("B1", 2_123_481, "2.2M", "0.85 / 0.97 / 1.73"),
            ("B2", 4_888_241, "4.7M", "0.57 / 0.76 / 1.32"),
            ("B3", 3_220_413, "3.0M", "0.50 / 0.73 / 1.33"),
            ("B4", 6_432_305, "6.3M", "0.51 / 0.68 / 1.26"),
            ("B5", 7_650_545, "9.2M", "0.43 / 0.61 / 1.08"),
            ("B6", 15_006_257, "15.0M", "0.40 / 0.55 / 1.05"),
        )
    ),
    *(
        Setting(
            f"ReDimNet2-{size}",
            "ReDimNet2",
            {"size": size, "n_mels": 72},
            parameters,
            published,
            eer,
            "ReDimNet2",
            "LM",
        )
        for size, parameters, published, eer in (
            ("B0", 1_115_220, "1.1M", "1.04 / 1.16 / 1.97"),
            ("B1", 2_161_488, "2.1M", "0.78 / 0.96 / 1.72"),
            ("B2", 3_677_760, "3.6M", "0.57 / 0.76 / 1.41"),
            ("B3", 4_181_576, "4.1M", "0.42 / 0.66 / 1.22"),
            ("B4", 6_659_744, "6.6M", "0.37 / 0.58 / 1.07"),
            ("B5", 8_959_272, "8.9M", "0.33 / 0.56 / 1.07"),
            ("B6", 12_394_784, "12.3M", "0.29 / 0.52 / 0.99"),
        )
    ),
    # Counted only.
    Setting("ReDimNet2-B3, norms", "ReDimNet2", {"size": "B3", "n_mels": 72, "output_norm": True}, 4_205_768),
    Setting("ReDimNet2-B6, norms", "ReDimNet2", {"size": "B6", "n_mels": 72, "output_norm": True}, 12_459_296, "12.5M"),
    Setting("CAM++ 192", "CAMPPlus", {"nOut": 192}, 6_848_544),
    Setting("ERes2Net base, 512", "ERes2Net", {"size": "base", "nOut": 512}, 9_887_808),
    Setting("ERes2Net huge", "ERes2Net", {"size": "huge"}, 55_165_024),
    Setting("ERes2NetV2 w24s4ep4", "ERes2NetV2", {"size": "V2_w24s4ep4"}, 53_513_632),
    Setting("ResNetSE34L, 256, SAP", "ResNetSE34L", {**SE34L, "nOut": 256, "encoder_type": "SAP"}, 1_404_054),
    Setting("ResNetSE34L, 256, ASP", "ResNetSE34L", {**SE34L, "nOut": 256, "encoder_type": "ASP"}, 1_436_822),
    Setting("ResNetSE34L, 512, ASP", "ResNetSE34L", {**SE34L, "nOut": 512, "encoder_type": "ASP"}, 1_502_614),
    Setting("ResNetSE34V2, 64, SAP", "ResNetSE34V2", {**SE34V2, "n_mels": 64, "encoder_type": "SAP"}, 6_979_916),
    Setting("ResNetSE34V2, 80, SAP", "ResNetSE34V2", {**SE34V2, "n_mels": 80, "encoder_type": "SAP"}, 7_373_644),
    Setting("ResNetSE34V2, 80, ASP", "ResNetSE34V2", {**SE34V2, "n_mels": 80, "encoder_type": "ASP"}, 8_684_364),
    Setting("ECAPA-TDNN 512, no context", "ECAPA_TDNN", {"channels": 512, "global_context": False}, 5_797_504),
    Setting("ECAPA-TDNN 1024, no context", "ECAPA_TDNN", {"channels": 1024, "global_context": False}, 14_263_872),
    Setting("ECAPA-TDNN 512, SpeechBrain", "ECAPA_TDNN", {"channels": 512, "layout": "speechbrain"}, 6_194_048),
    Setting("ECAPA-TDNN 512, sums", "ECAPA_TDNN", {"channels": 512, "layout": "taoruijie"}, 6_978_176),
    Setting("MHFA", "MHFA", {"n_mels": 80}, 1_073_664),
    Setting("ResNet34 by its own name", "ResNet34", {}, 6_634_336),
    Setting("ResNet34, two layers", "ResNet", {"depth": 34, "two_emb_layer": True}, 6_700_128),
    Setting("ResNet34, 3D-Speaker", "ResNet", {"depth": 34, "nOut": 192, "two_emb_layer": True}, 6_343_648, "6.34M"),
    Setting("ResNet18", "ResNet", {"depth": 18}, 4_105_440),
    Setting("ResNet50", "ResNet", {"depth": 50}, 11_131_360),
    Setting("ResNet101", "ResNet", {"depth": 101}, 15_892_448),
    Setting("ResNet152", "ResNet", {"depth": 152}, 19_814_880),
)
