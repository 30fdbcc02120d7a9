"""Self-supervised front ends: figures of transformers' networks, files of its names and of fairseq's, what trains."""

import re
import types
import zlib

import pytest
import torch

from errors import UsageError
from frontend import ssl
from frontend.ssl import Architecture, FrontEnd
from models import MHFA
from speaker_model import load_model
from storage import checkpoint, interop, upstreams
from training.finetuning import build_optimizer, load_initial

WIDTH, HEADS = 32, 4
TINY = {
    "wavlm": Architecture(WIDTH, 2, HEADS, norm_first=False, relative=True),
    "wavlm_large": Architecture(WIDTH, 2, HEADS, norm_first=True, relative=True),
    "hubert": Architecture(WIDTH, 2, HEADS, norm_first=False),
    "hubert_large": Architecture(WIDTH, 2, HEADS, norm_first=True),
}
# First state, and the last: values at [0, 0], [5, 7], [-1, -1] and the mean of their sizes, as transformers 5.24 has
# them on torch 2.14 with the weights of ``published``: WavLMModel and HubertModel of these sizes.
FIGURES = {
    "wavlm": ((-1.24767, -1.01836, -0.06516, 0.868), (1.25522, -0.37755, -1.54288, 0.90457)),
    "wavlm_large": ((6.50613, 0.12468, 4.54952, 4.37782), (1.67742, 0.57039, 0.3347, 0.86838)),
    "hubert": ((-1.23788, -1.00657, -0.08105, 0.86812), (1.26007, -0.37199, -1.54261, 0.90456)),
    "hubert_large": ((6.36384, -0.05659, 4.95736, 4.38723), (1.65261, 0.52469, 0.485, 0.86906)),
}
FAIRSEQ = (  # the names of transformers, as fairseq and Microsoft's WavLM have them
    (r"masked_spec_embed", "mask_emb"),
    (r"feature_projection\.projection", "post_extract_proj"),
    (r"feature_projection\.layer_norm", "layer_norm"),
    (r"pos_conv_embed\.conv\.parametrizations\.weight\.original0", "pos_conv.0.weight_g"),
    (r"pos_conv_embed\.conv\.parametrizations\.weight\.original1", "pos_conv.0.weight_v"),
    (r"pos_conv_embed\.conv", "pos_conv.0"),
    (r"conv_layers\.(\d)\.conv", r"conv_layers.\1.0"),
    (r"conv_layers\.0\.layer_norm", "conv_layers.0.2"),
    (r"(layers\.\d)\.layer_norm", r"\1.self_attn_layer_norm"),
    (r"attention\.gru_rel_pos_linear", "self_attn.grep_linear"),
    (r"attention\.gru_rel_pos_const", "self_attn.grep_a"),
    (r"attention\.rel_attn_embed", "self_attn.relative_attention_bias"),
    (r"attention\.", "self_attn."),
    (r"feed_forward\.intermediate_dense", "fc1"),
    (r"feed_forward\.output_dense", "fc2"),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Networks so small that they take a moment."""
    monkeypatch.setattr(ssl, "ARCHITECTURES", TINY)


def published(name) -> dict:
    """A file of transformers: a sine for each tensor, whose phase depends on its name."""
    sizes, shapes = TINY[name], {"masked_spec_embed": (WIDTH,)}

    def layer(named, shape):
        shapes[f"{named}.weight"], shapes[f"{named}.bias"] = shape, shape[:1]

    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        convolution = f"feature_extractor.conv_layers.{i}"
        shapes[f"{convolution}.conv.weight"] = (512, 512 if i else 1, kernel)
        if sizes.norm_first:
            shapes[f"{convolution}.conv.bias"] = (512,)
        if sizes.norm_first or not i:
            layer(f"{convolution}.layer_norm", (512,))
    layer("feature_projection.layer_norm", (512,))
    layer("feature_projection.projection", (WIDTH, 512))
    position = "encoder.pos_conv_embed.conv"
    shapes[f"{position}.bias"] = (WIDTH,)
    shapes[f"{position}.parametrizations.weight.original0"] = (1, 1, 128)
    shapes[f"{position}.parametrizations.weight.original1"] = (WIDTH, WIDTH // 16, 128)
    layer("encoder.layer_norm", (WIDTH,))
    for i in range(sizes.blocks):
        block = f"encoder.layers.{i}"
        for part in "qkv":
            layer(f"{block}.attention.{part}_proj", (WIDTH, WIDTH))
        layer(f"{block}.attention.out_proj", (WIDTH, WIDTH))
        layer(f"{block}.layer_norm", (WIDTH,))
        layer(f"{block}.feed_forward.intermediate_dense", (4 * WIDTH, WIDTH))
        layer(f"{block}.feed_forward.output_dense", (WIDTH, 4 * WIDTH))
        layer(f"{block}.final_layer_norm", (WIDTH,))
        if sizes.relative:
            layer(f"{block}.attention.gru_rel_pos_linear", (8, WIDTH // HEADS))
            shapes[f"{block}.attention.gru_rel_pos_const"] = (1, HEADS, 1, 1)
    if sizes.relative:
        shapes["encoder.layers.0.attention.rel_attn_embed.weight"] = (320, HEADS)
    return {named: sine(named, shape) for named, shape in shapes.items()}


def sine(named, shape):
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    values = torch.sin(0.37 * places + zlib.crc32(named.encode()) % 1000) * (0.5 if "attention" in named else 0.05)
    about_one = named.endswith(("norm.weight", "original0"))
    return values.float().reshape(shape) + (1.0 if about_one else 0.0)


def in_fairseq(file: dict) -> dict:
    renamed = {}
    for named, tensor in file.items():
        for theirs, ours in FAIRSEQ:
            named = re.sub(theirs, ours, named)
        renamed[named] = tensor
    return renamed


def wave(samples=8000):
    return 0.1 * torch.sin(0.05 * torch.arange(float(samples)) ** 1.1)[None]


def filled(name, **keys):
    """A front end with the weights of ``published``."""
    module = FrontEnd(WIDTH, name, ssl_output="last", ssl_dropout=0.0, **keys).eval()
    found = interop.translate(published(name))
    module.load_state_dict({key.removeprefix("frontend.plugin."): value for key, value in found.items()})
    return module


@pytest.mark.parametrize("name", TINY)
def test_the_states_are_those_of_transformers(name):
    module = filled(name)
    with torch.no_grad():
        frames = module.upstream.convolved(wave())
        found = module.upstream.states(frames)[1:]
        assert torch.equal(module(wave()), found[1].transpose(1, 2))
    for state, figures in zip(found, FIGURES[name]):
        assert state.shape == (1, 24, WIDTH)
        values = [float(v) for v in (state[0, 0, 0], state[0, 5, 7], state[0, -1, -1], state.abs().mean())]
        assert values == pytest.approx(figures, abs=2e-4)


@pytest.mark.parametrize("prefix", ["", "wavlm.", "w2v_encoder.w2v_model.", "module.wavlm."])
def test_files_of_fairseq_have_the_same_tensors(prefix):
    from storage.checkpoint import weights_of

    file = published("wavlm")
    theirs = {**in_fairseq(file), "final_proj.weight": torch.ones(2), "label_embs_concat": torch.ones(2)}
    assert not set(theirs) & set(file) - {"encoder.layer_norm.weight", "encoder.layer_norm.bias"} - {
        name for name in file if "final_layer_norm" in name
    }
    found, expected = weights_of({prefix + name: t for name, t in theirs.items()}, "x"), weights_of(file, "x")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert all(name.startswith("__S__." + upstreams.PART) for name in found)


def test_norms_of_every_convolution_have_a_name_more_in_fairseq():
    file = {"feature_extractor.conv_layers.3.2.1.bias": torch.ones(2), **in_fairseq(published("wavlm_large"))}
    assert upstreams.PART + "convolutions.3.norm.bias" in interop.translate(file)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("output", ssl.OUTPUTS)
def test_a_row_alone_gives_the_same_and_all_that_trains_has_a_gradient(name, output):
    """Of several processes each must have a gradient for each parameter."""
    torch.manual_seed(0)
    module = FrontEnd(3 * WIDTH if output == "all" else 20, name, ssl_output=output)
    x = 0.1 * torch.randn(3, 4000)
    module.train()(x).square().mean().backward()
    assert not [key for key, p in module.named_parameters() if p.grad is None]
    features = module.eval()(x)
    assert features.shape == (3, 3 * WIDTH if output == "all" else 20, 12)
    assert torch.allclose(features, torch.cat([module(row[None]) for row in x]), atol=1e-5)
    assert module(0 * x).isfinite().all()


def test_weighted_states_begin_with_their_mean_and_fewer_blocks_are_the_first():
    module = FrontEnd(WIDTH, "hubert_large", ssl_dropout=0.0).eval()
    states = module.upstream.states(module.upstream.convolved(wave()))
    assert torch.allclose(module(wave()), torch.stack(states).mean(dim=0).transpose(1, 2), atol=1e-5)
    assert torch.allclose(states[-1].mean(dim=2), torch.tensor(0.0), atol=1e-5)  # as s3prl has the last, normalised
    fewer = FrontEnd(WIDTH, "hubert_large", ssl_blocks=1, ssl_output="last").eval()
    fewer.load_state_dict(module.state_dict(), strict=False)
    assert torch.equal(fewer(wave()), states[1].transpose(1, 2))


def test_mhfa_weighs_frames_by_one_mixture_of_states_and_averages_another():
    module = MHFA.MainModel(
        8, 3 * WIDTH, heads=2, compression=5, frontend=FrontEnd(3 * WIDTH, "wavlm", ssl_output="all")
    )
    module.weights_k.data = torch.tensor([0.3, -1.0, 2.0])
    module.weights_v.data = torch.tensor([1.0, 0.0, -0.5])
    upstream, x = module.eval().frontend.plugin.upstream, 0.1 * torch.randn(2, 4000)
    with torch.no_grad():
        states = upstream.states(upstream.convolved(x))
        for row, embedding in enumerate(module(x)):
            keys, values = (
                sum(w * state[row] for w, state in zip(torch.softmax(weights, 0), states))
                for weights in (module.weights_k, module.weights_v)
            )
            keys, values = module.cmp_linear_k(keys), module.cmp_linear_v(values)
            heads = [torch.softmax(keys @ head, dim=0) @ values for head in module.att_head.weight]
            assert torch.allclose(embedding, module.pooling_fc(torch.cat(heads)), atol=1e-5)
    with pytest.raises(ValueError, match="n_mels: 3 states of 32 values are 96, got 80"):
        FrontEnd(80, "wavlm", ssl_output="all")


@pytest.mark.parametrize(("trained", "still"), [("none", "upstream."), ("transformer", "upstream.convolutions.")])
def test_what_is_not_to_train_has_no_gradient_and_no_dropout(trained, still):
    module = FrontEnd(WIDTH, "wavlm", ssl_train=trained).train()
    features = module(wave())
    features.square().mean().backward()
    named = dict(module.named_parameters())
    assert {key for key, p in named.items() if p.grad is None} == {key for key in named if key.startswith(still)}
    assert torch.equal(module(wave()), features) == (trained == "none")
    assert len(module.blocks()) == (0 if trained == "none" else 2)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"ssl_model": "wavlm_huge"}, "ssl_model: must be one of wavlm, .*; got 'wavlm_huge'"),
        ({"ssl_output": "mean"}, "ssl_output: must be one of weighted, last, all; got 'mean'"),
        ({"ssl_train": "some"}, "ssl_train: must be one of all, transformer, none; got 'some'"),
        ({"ssl_blocks": 3}, r"ssl_blocks: wavlm has 2 blocks, got 3 \(0: all\)"),
        ({"ssl_dropout": 1.0}, "ssl_dropout: must be at least 0 and below 1, got 1.0"),
    ],
)
def test_values_that_cannot_be_are_named(keys, line):
    with pytest.raises(ValueError, match=line):
        FrontEnd(WIDTH, **{"ssl_model": "wavlm", **keys})


KEYS = {
    "model": "ECAPA_TDNN",
    "channels": 16,
    "aggregate": 32,
    "n_mels": WIDTH,
    "frontend": "ssl",
    "ssl_model": "wavlm",
}


@pytest.mark.parametrize("name", ["wavlm", "wavlm_large"])
def test_training_starts_from_a_published_file(settings, tools, tmp_path, capsys, name):
    file = {key: tensor for key, tensor in published(name).items() if not key.endswith("conv.bias") or "pos" in key}
    torch.save(file, tmp_path / "their.bin")
    keys = {**KEYS, "ssl_model": name, "ssl_output": "last", "initial_model": tmp_path / "their.bin"}
    trainer = tools.build(settings, **keys)
    load_initial(trainer.network, trainer.dataset, trainer.config, trainer.log)
    said = capsys.readouterr().out
    count = len(interop.translate(file))
    assert (
        f"(WavLM, HuBERT or wav2vec 2.0): {count} of {count} tensors loaded" in said
        and "starts fresh" not in said
        and "features are" not in said
    )
    assert "it is the front end; the rest of the model and the loss start fresh" in said
    own = trainer.network.state_dict()
    for key, tensor in interop.translate(file).items():
        assert torch.equal(own["__S__." + key], tensor)
    if name == "wavlm_large":
        assert not own["__S__.frontend.plugin.upstream.convolutions.3.conv.bias"].any()
    fewer = tools.build(settings, **{**keys, "ssl_blocks": 1})
    load_initial(fewer.network, fewer.dataset, fewer.config, fewer.log)
    assert "  not used: " in (said := capsys.readouterr().out) and "blocks.1." not in said
    spare = ("blocks.1.", "norm_blocks.") if name == "wavlm_large" else ("blocks.1.",)
    count = sum(key.removeprefix(upstreams.PART).startswith(spare) for key in interop.translate(file))
    assert f"  not used: {count} tensors of layers that the model has not\n" in said


def test_a_published_file_of_another_network_is_refused(settings, tools, tmp_path):
    torch.save(published("wavlm"), tmp_path / "their.bin")

    def refused(**keys):
        own = {key: value for key, value in {**KEYS, **keys}.items() if value is not None}
        trainer = tools.build(settings, **own, initial_model=tmp_path / "their.bin")
        with pytest.raises(UsageError) as error:
            load_initial(trainer.network, trainer.dataset, trainer.config, trainer.log)
        return str(error.value)

    assert "12 tensors of frontend/ssl.py are missing" in refused(ssl_model="wavlm_large")
    assert "0 tensors of frontend/ssl.py are missing or of another shape, 7 of the file" in refused(ssl_model="hubert")
    assert "set the ssl_model that it is, or --allow_partial" in refused(ssl_model="wavlm_large")
    assert "set frontend: ssl and the ssl_model that it is" in refused(frontend=None, ssl_model=None)
    with pytest.raises(UsageError, match="which embeds no speakers; train a model on it with frontend: ssl"):
        load_model(tmp_path / "their.bin")


def test_a_second_run_trains_what_the_first_left_as_it_was(settings, tools, tmp_path, capsys):
    import trainSpeakerNet
    from storage.files import save_atomically

    path = tmp_path / "first.model"
    save_atomically(tools.build(settings, **KEYS, ssl_train="none").state.capture(), path)

    def status(**keys):
        words = {**settings, **KEYS, "initial_model": path, "save_path": tmp_path / "second", **keys}
        return trainSpeakerNet.main([f"--{key}={value}" for key, value in words.items()] + ["--print_config"])

    assert status(ssl_train="all", ssl_dropout=0.2) == 0
    assert status(ssl_output="last") == 2 and "was trained with weighted" in capsys.readouterr().err
    again = tools.build(settings, **KEYS, initial_model=path, ssl_train="all", ssl_dropout=0.2)
    load_initial(again.network, again.dataset, again.config, again.log)
    save_atomically(again.state.capture(), tmp_path / "second.model")
    assert load_model(path).identity == load_model(tmp_path / "second.model").identity


def test_what_allow_partial_starts_fresh_in_the_front_end_is_listed(settings, tools, tmp_path, capsys):
    torch.save(published("hubert"), tmp_path / "their.bin")
    trainer = tools.build(settings, **KEYS, initial_model=tmp_path / "their.bin", allow_partial=True)
    load_initial(trainer.network, trainer.dataset, trainer.config, trainer.log)
    said = capsys.readouterr().out
    assert "  starts fresh: model.frontend.plugin.upstream.relative.values.weight: not in the file\n" in said
    assert said.count("starts fresh") == 7 and "layer1" not in said


@pytest.mark.parametrize(
    "more",
    [
        ["tdnn.0.kernel.weight", "feature_extractor.bias", "objective.weight", "projector.bias"],  # an x-vector
        ["quantizer.codevectors", "project_q.weight", "lm_head.bias", "layer_weights"],
    ],
)
def test_what_a_task_has_behind_the_network_is_left_out(more):
    file = published("wavlm")
    tensors = {f"wavlm.{name}": tensor for name, tensor in file.items()}
    assert interop.translate({**tensors, **dict.fromkeys(more, torch.ones(2))}).keys() == interop.translate(file).keys()


def test_files_that_s3prl_converted_are_read(tmp_path):
    from storage import checkpoint

    file = in_fairseq(published("hubert"))
    torch.save({"task_cfg": {"normalize": False}, "model_cfg": {}, "model_weight": file}, tmp_path / "theirs.pt")
    found = checkpoint.weights_of(checkpoint.load(tmp_path / "theirs.pt"), "x")
    assert found.keys() == checkpoint.weights_of(file, "x").keys()


def test_a_run_with_other_weights_to_train_begins_from_its_model(settings, tools):
    trainer = tools.build(settings, **KEYS, ssl_train="none")
    trainer.saver.last()
    with pytest.raises(
        UsageError, match=r"tensors were trained, with this configuration .* start from it with initial"
    ):
        tools.build(settings, **KEYS).resume()


def test_a_front_end_alone_embeds_nothing(settings, tools, tmp_path):
    from storage import checkpoint

    file, network = published("wavlm"), tools.build(settings, **KEYS).network
    with pytest.raises(UsageError, match=r"is a WavLM, HuBERT or wav2vec 2\.0, a front end alone; train a model on it"):
        checkpoint.load_model_exactly(network, file, "their.bin", "ECAPA_TDNN")


def test_other_blocks_than_those_of_a_checkpoint_are_told_by_their_number():
    from settings.carried import contradictions
    from settings.reader import Setting

    written, theirs = {"ssl_blocks": Setting(1, "command line")}, {"ssl_blocks": Setting(0, "last.model")}
    lines = contradictions(types.SimpleNamespace(ssl_blocks=1), written, theirs)
    assert (
        lines["ssl_blocks"] == "command line: --ssl_blocks: 1, but last.model was trained with 0; leave ssl_blocks out"
    )


def test_a_model_card_tells_of_which_network_the_features_are(settings, tools):
    from exporting.card import front_end

    config = tools.build(settings, **KEYS, ssl_train="none", ssl_blocks=1).config
    told = "`frontend: ssl`, `ssl_model: wavlm`, `ssl_blocks: 1`, `ssl_output: weighted`, 32 values a frame"
    assert front_end(config) == told
    keys = {"model": "ECAPA_TDNN", "channels": 16, "features": "wespeaker", "n_mels": 24}
    assert front_end(tools.build(settings, **keys).config) == "`features: wespeaker`, 24 bands"


@pytest.mark.parametrize("names", upstreams.MARKS)
def test_a_users_own_model_that_has_their_names_is_loaded_as_it_is(names):
    """Plug-ins of voxceleb_trainer copy such networks into models/."""
    network = torch.nn.Module()
    for name in names:
        *parts, last = ("__S__", *name.split("."))
        module = network
        for part in parts:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(torch.zeros(2)))
    checkpoint.load_model_exactly(network, {name: torch.ones(2) for name in names}, "x.model", "Mine")
    assert all(bool(p.all()) for p in network.parameters())
    assert checkpoint.toolkit_of(dict.fromkeys(names, torch.ones(2))).part  # of itself such a file is a front end


def test_random_weights_and_a_rate_of_nothing_are_told(settings, tools, capsys):
    def told(**keys):
        trainer = tools.build(settings, **keys, frontend_lr_factor=0.1)
        load_initial(trainer.network, trainer.dataset, trainer.config, trainer.log)
        return capsys.readouterr().out

    nothing, random = "frontend_lr_factor: does nothing", "frontend/ssl.py begins with random weights"
    assert random in told(**KEYS) and nothing not in told(**KEYS)
    assert nothing in told(**KEYS, ssl_train="none", ssl_output="last")
    said = told(model="ECAPA_TDNN")
    assert nothing in said and random not in said


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1.0, {"backbone": 0.5, "head": 1.0}), (0.01, {"frontend": 0.005, "backbone": 0.5, "head": 1.0})],
)
def test_a_front_end_has_a_learning_rate_of_its_own(settings, tools, factor, expected):
    keys = {"backbone_lr_factor": 0.5, "frontend_lr_factor": factor, "lr": 0.1, "scheduler": "cosine"}
    trainer = tools.build(settings, **KEYS, **keys)
    optimizer, *_ = build_optimizer(trainer.config, trainer.network, 4, 1)
    groups = {group["name"]: group for group in optimizer.param_groups}
    rates = {name: group["lr"] / groups["head"]["lr"] for name, group in groups.items()}
    assert rates == pytest.approx(expected)
    counted = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(counted) == sorted(map(id, trainer.network.parameters()))
    if "frontend" in groups:
        own = trainer.network.__S__.frontend.plugin.parameters()
        assert [id(p) for p in groups["frontend"]["params"]] == [id(p) for p in own]


def test_the_blocks_of_a_front_end_are_computed_again_too(settings, tools):
    from training.recompute import is_recomputed

    trainer = tools.build(settings, **KEYS, gradient_checkpointing=True)
    plugin = trainer.network.__S__.frontend.plugin
    assert all(is_recomputed(block) for block in plugin.upstream.blocks)


def test_a_front_end_computes_in_the_precision_of_the_run():
    from models.frontend import FrontEnd as Features

    module = FrontEnd(WIDTH, "wavlm", ssl_dropout=0.0)
    seen = []
    module.upstream.blocks[0].up.register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features = Features("", WIDTH, "mean", plugin=module)(wave())
    assert seen == [torch.bfloat16] and features.dtype is torch.float32 and features.requires_grad


def test_onnx_takes_every_length(tmp_path):
    from exporting.formats import OPSET, answered_by_the_check, without_stdout
    from storage.exported import open_session

    module, path = FrontEnd(WIDTH, "wavlm_large", ssl_blocks=1).eval(), tmp_path / "its.onnx"
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch", 1: "samples"}}}
    with without_stdout(), answered_by_the_check():
        torch.onnx.export(module, (wave(),), str(path), opset_version=OPSET, dynamo=False, **names)
    x = torch.cat([wave(5000), 0.01 * wave(5000)])
    (found,) = open_session(path).run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), module(x), atol=1e-4)
