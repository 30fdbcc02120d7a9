"""ReDimNet2's pooling over time against full-rate sums and finite differences, its sizes, and what its files say."""

import math

import pytest
import torch
from foreign_models import voice
from foreign_redimnet import STAGES2, authors_redimnet, authors_redimnet2_dual, redimnet2
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from errors import UsageError
from models import ReDimNet, ReDimNet2
from models.ReDimNet import weighted_sum
from settings.carried import model_settings
from speaker_model import load_model
from storage import checkpoint

STEPS = (1, 1, 2, 4, 4, 1)


def drawn(seed=0):
    """Six outputs (2, 3, 8 / step) and weights of their sum."""
    rng = torch.Generator().manual_seed(seed)
    outputs = [torch.randn(2, 3, 8 // step, generator=rng, requires_grad=True) for step in STEPS]
    return outputs, torch.randn(1, len(STEPS), 3, 1, generator=rng, requires_grad=True)


def at_the_full_rate(outputs, weights):
    full = [x.repeat_interleave(step, dim=2) for x, step in zip(outputs, STEPS)]
    return (torch.stack(full, 1) * weights.softmax(1)).sum(1)


def test_the_sum_over_rates_is_that_of_repeated_outputs_with_its_gradients():
    outputs, weights = drawn()
    into = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    for fewer in (6, 4, 3, 1):  # as the stages see them, one after the other
        part, w = outputs[:fewer], weights[:, :fewer]
        ours, theirs = weighted_sum(part, w, STEPS), at_the_full_rate(part, w)
        assert torch.allclose(ours, theirs, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad((s * into).sum(), [*part, weights]) for s in (ours, theirs))):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_the_backbone_are_finite_differences(norm):
    torch.manual_seed(0)
    stages = ((1, 1, 2, 3, 1), (2, 1, 1, 3, 2), (1, 1, 0.5, 3, 2))  # whose depthwise convolutions pool 1, 2 and 4
    size = ReDimNet.Size(4, "convnext_like", 1, stages, 3, output_norm=norm)
    backbone = ReDimNet2.TimePoolingBackbone(size, 6).eval()
    for parameter in backbone.inputs_weights:
        parameter.data.normal_()
    x = torch.randn(2, 6, 12, requires_grad=True)
    into, step = torch.randn_like(backbone(x)), 2e-3
    reached = [x, *(p for name, p in backbone.named_parameters() if name != "inputs_weights.0")]
    gradients = torch.autograd.grad((backbone(x) * into).sum(), reached)
    for tensor, gradient in zip(reached, gradients):
        ahead = gradient / gradient.norm()
        with torch.no_grad():
            values = []
            for side in (step, -step):
                tensor.add_(side * ahead)
                values.append(float((backbone(x) * into).double().sum()))
                tensor.sub_(side * ahead)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(gradient.norm()), rel=0.02, abs=0.02), tensor.shape


def test_frames_that_are_left_over_are_left_out_and_missing_ones_repeated():
    torch.manual_seed(0)
    backbone = ReDimNet2.TimePoolingBackbone(ReDimNet.Size(2, "basic_resnet", 1, STAGES2), 24).eval()
    x = torch.randn(1, 24, 11)
    assert backbone(x).shape[3] == 8 and torch.equal(backbone(x), backbone(x[:, :, :8]))
    assert torch.equal(backbone(x[:, :, :3]), backbone(x[:, :, [0, 1, 2, 0]]))
    model = ReDimNet2.MainModel(nOut=8, size="B0", channels=4).eval()
    with torch.inference_mode():
        assert model(0.1 * torch.randn(2, 400)).isfinite().all()
        assert model(torch.zeros(1, 4000)).isfinite().all()


@pytest.mark.parametrize(
    "module, keys, said",
    [
        (ReDimNet2, {"size": "B7"}, "size: must be one of B0, B1, B2, B3, B4, B5, B6; got 'B7'"),
        (ReDimNet2, {"size": "B2", "n_mels": 80}, "n_mels: ReDimNet2 of size B2 needs a multiple of 12, got 80"),
        (ReDimNet, {"channels": -3}, "channels: must be at least 1, got -3"),
        (ReDimNet, {"size": "b2"}, "size: must be one of B0, .*; got 'b2'"),
        (ReDimNet, {"block": "resnet"}, "block: must be one of convnext_like, basic_resnet, basic_resnet_fwse; got"),
        (ReDimNet2, {"stages": [[1, 2, 1]]}, r"stages: stage 0 must be \[stride, .*, got \[1, 2, 1\]"),
        (ReDimNet2, {"stages": [[1, 2, 1, 9], [2, 0, 1, 9, 2]]}, "stages: stage 1 must be"),
        (ReDimNet2, {"stages": ["1 2"]}, "stages: stage 0 must be"),
        (ReDimNet2, {"stages": [[1, 2.5, 1, 9]]}, r"stages: stage 0 must be .*, got \[1, 2\.5, 1, 9\]"),
        (ReDimNet2, {"stages": [[True, 2, 1, 9]]}, r"stages: stage 0 must be .*, got \[True, 2, 1, 9\]"),
        (ReDimNet2, {"stages": [[1, 2, float("nan"), 9]]}, "stages: stage 0 must be"),
        (
            ReDimNet2,
            {"stages": [[1, 2, 1, 9], [1, 2, 0.01, 9]]},
            "stages: stage 1: an expansion of 0.01 leaves no chan",
        ),
        (
            ReDimNet,
            {"stages": [[1, 2, 1, 9, 2]]},
            r"stages: .* \[stride, blocks, expansion, reduction\], got \[1, 2, 1",
        ),
        (ReDimNet2, {"stages": [[1, 2, 1, 0]], "dual": True}, "dual: stage 0 has no 1-D block"),
        (ReDimNet2, {"frame_step": 0}, "frame_step: must be from 1 to 25 ms"),
    ],
)
def test_settings_that_it_does_not_have_are_refused_by_name(module, keys, said):
    with pytest.raises(ValueError, match=said):
        module.MainModel(**keys)


@pytest.mark.parametrize("size", ReDimNet2.SIZES)
def test_two_stages_pool_time_and_the_volume_stays(size):
    chosen = ReDimNet2.SIZES[size]
    stages = [ReDimNet.Stage(*values) for values in chosen.stages]
    assert [stage.time_stride for stage in stages] == [1, 1, 2, 1, 2, 1]
    assert 72 % math.prod(stage.stride for stage in stages) == 0
    with torch.device("meta"):
        backbone = ReDimNet2.TimePoolingBackbone(chosen, 72)
    assert {len(w[0, 0]) for w in backbone.inputs_weights} == {chosen.channels * 72} and backbone.steps[-1] == 4


PUBLISHED = {"B0": (1.1, 0.33), "B1": (2.1, 0.56), "B2": (3.6, 0.95), "B3": (4.1, 2.70), "B4": (6.6, 4.62)}
PUBLISHED |= {"B5": (8.9, 9.62), "B6": (12.3, 13.05)}  # millions of parameters, which are cut off, and GMACs


def test_parameters_are_the_papers():
    for size, (published, _) in PUBLISHED.items():
        with torch.device("meta"):
            model = ReDimNet2.MainModel(size=size)
        trained = sum(p.numel() for name, p in model.named_parameters() if name != "backbone.inputs_weights.0")
        assert int(trained / 1e5) / 10 == published, size


@pytest.mark.parametrize("size", ["B0", "B3"])
def test_operations_are_the_papers(size):
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = ReDimNet2.MainModel(size=size).eval()
        model.backbone(torch.randn(1, 72, 200))
    width = model.backbone.output_channels
    pooling = (3 * width * 128 + 128 * width) * 200  # the context counted in each frame
    counted = counter.get_total_flops() / 2 + pooling  # but for the attention's own products, which it does not see
    assert counted == pytest.approx(1e9 * PUBLISHED[size][1], rel=0.05)


# ------------------------------------------------------------------------------------- what the authors' files say

SPEC = {"do_preemph": True, "do_spec_aug": False, "norm_signal": True}
OURS = {"F": 72, "C": 24, "agg_gnorm": True, "return_2d_output": True, "feat_type": "tf", "spec_params": SPEC}


def hub_file(case=authors_redimnet2_dual, **other):
    """A file as the authors write it, its network and what embeds as theirs does."""
    state, keys, embed = case()
    second = keys["model"] == "ReDimNet2"
    config = {"F": keys["n_mels"], "C": keys["channels"], "block_1d_type": "conv+att", "global_context_att": True}
    plan = [(s[:1], s[1:]) for s in keys.get("stages", ())] or [((p[0],), p[1:4]) for p in embed.plan]
    if second:
        config |= {"stages_setup": [[[a[0], b[3]], b[0], b[1], [[3, 3]], b[2]] for a, b in plan], "spec_params": SPEC}
        config |= {"return_2d_output": True, "compress_tconvs": True, "feat_type": "tf", "hop_length": 160}
        config |= {"agg_gnorm": keys["output_norm"], "dual_agg": keys["dual"], "out_channels": keys["head_channels"]}
    else:
        config |= {"stages_setup": [(a[0], b[0], b[1], [(3, 3)], b[2]) for a, b in plan], "hop_length": 240}
        config |= {"block_2d_type": "basic_resnet_fwse", "group_divisor": 1, "out_channels": None}
    return {"model_config": config | other, "state_dict": state}, embed


@pytest.mark.parametrize("case", [authors_redimnet, authors_redimnet2_dual])
def test_a_file_of_the_authors_is_read_without_a_configuration(case, tmp_path):
    file, embed = hub_file(case)
    torch.save(file, tmp_path / "b9.pt")
    model, x = load_model(tmp_path / "b9.pt"), voice()
    ours, theirs = torch.from_numpy(model.embed(x[0].numpy(), 16000)), embed(x)[0]
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_training_from_such_a_file_takes_its_architecture_and_refuses_another(tmp_path):
    file, _ = hub_file()
    torch.save(file, tmp_path / "b9.pt")
    taken = model_settings(checkpoint.load(tmp_path / "b9.pt"), "b9.pt")
    assert {"stages", "channels", "output_norm", "dual", "features", "n_mels", "model"} <= set(taken)
    (tmp_path / "x.yaml").write_text("model: ReDimNet2\noutput_norm: false\ntrainfunc: aamsoftmax\n")
    with pytest.raises(UsageError, match=r"output_norm: False, but .*b9\.pt was trained with True"):
        load_model(tmp_path / "b9.pt", str(tmp_path / "x.yaml"))
    (tmp_path / "x.yaml").write_text("model: ReDimNet2\nstages: 3\ntrainfunc: aamsoftmax\n")
    with pytest.raises(UsageError, match=r"x\.yaml:2: stages: expected a list; got '3'"):
        load_model(tmp_path / "b9.pt", str(tmp_path / "x.yaml"))


def test_published_sizes_are_known_by_what_a_file_says():
    def keys(config):
        return checkpoint.redimnet.keys_of({"model_config": config, "state_dict": {}}, "x.pt")

    assert keys(OURS)["size"] == "B3" and keys(OURS)["output_norm"]  # the recipe of B3 names no stages
    assert "size" not in keys({**OURS, "out_channels": 224})
    for name, size in ReDimNet2.SIZES.items():
        setup = [[[s[0], s[4]], s[1], s[2], [[3, 3]], s[3]] for s in size.stages]
        given = {**OURS, "C": size.channels, "stages_setup": setup, "out_channels": size.head_channels or None}
        assert keys(given)["size"] == name and keys(given)["features"] == "redimnet2" and keys(given)["wave_norm"]
    for name, size in ReDimNet.SIZES.items():
        setup = [(s[0], s[1], s[2], [(3, 3)], s[3] or None) for s in size.stages]
        given = {"C": size.channels, "block_1d_type": "conv+att", "block_2d_type": size.block, "stages_setup": setup}
        found = keys({**given, "group_divisor": size.group_size, "hop_length": 240, "feat_type": "pt"})
        assert (found["model"], found["size"], found["frame_step"]) == ("ReDimNet", name, 15)
        assert found["features"] == "redimnet" and not found["wave_norm"] and found["pooling"] == "ASTP"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"block_1d_type": "att"}, r"model_config\.block_1d_type: no network here has 'att', but 'conv\+att'"),
        ({"emb_bn": True}, r"model_config\.emb_bn: no network here has True"),
        ({"return_2d_output": False}, r"model_config\.return_2d_output: no network here has False"),
        ({"feat_type": "tf_spec"}, r"model_config\.feat_type: no features here are its 'tf_spec'"),
        ({"spec_params": {"spec_norm": "bn"}}, r"model_config\.spec_params\.spec_norm: no network here has 'bn'"),
        ({"hop_length": 100}, r"model_config\.hop_length: 100 samples are no whole ms"),
        ({"stages_setup": [[1, 2]]}, "its model_config is not one of ReDimNet's: "),
        ({"C": "many"}, "its model_config is not one of ReDimNet's: "),
    ],
)
def test_a_network_that_cannot_be_built_here_is_one_line(change, said):
    with pytest.raises(UsageError, match=said) as caught:
        checkpoint.redimnet.keys_of({"model_config": {**OURS, **change}, "state_dict": {}}, "x.pt")
    assert str(caught.value).startswith("x.pt: ") and "\n" not in str(caught.value)


def test_files_without_a_description_need_one():
    state, keys, _ = redimnet2(STAGES2)
    assert checkpoint.toolkit_of(state).name == "ReDimNet or ReDimNet2" and keys["model"] == "ReDimNet2"
    assert checkpoint.redimnet.keys_of(state, "x.pt") == {}
