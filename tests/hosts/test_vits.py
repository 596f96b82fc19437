"""tomesd.vit on what timm, torchvision and transformers do around their blocks."""

import copy
import importlib
import io
import time

import accelerate.hooks
import ddp_worker
import numpy as np
import pytest
import tiny_vit
import torch
import torch.nn.functional as F
from subjects import traces

import tomesd.vit as tome

CASES = tiny_vit.CASES
SCHEDULE = [7, 0, 9, 40]


def test_sequence_first_encoders_merge_as_batch_first_ones():
    """SWAG's encoder keeps tokens [N, B, C], as its attention does; its blocks are torchvision's else."""
    model = CASES["torchvision"].build()
    tome.patch.swag(model)
    model.r = SCHEDULE
    tokens = torch.randn(2, 65, 24)
    with torch.no_grad():
        want = model.encoder.layers(tokens)
        for block in model.encoder.layers:
            block.self_attention.batch_first = False
        tome.patch.swag(model)
        model.r = SCHEDULE
        got = model.encoder.layers(tokens.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm ViT", "timm DINOv2 with registers", "timm EVA02"])
def test_dense_outputs_of_timm_come_back_on_the_original_grid(name):
    case = CASES[name]
    model = case.build()
    x = tiny_vit.images()
    tome.apply_patch(model, trace_source=True)
    with torch.no_grad():
        plain = model.forward_features(x)
        model.r = SCHEDULE
        features = model.forward_features(x)
        assert features.shape == plain.shape
        merged = tome.source(model)
        assert merged.tokens == plain.shape[1]
        torch.testing.assert_close(merged.unmerge(merged.merge(features, "drop")), features)
        final, each = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
        torch.testing.assert_close(final, features)
        for layer, (patches, prefix) in enumerate(each):
            after = tome.source(model, layer)
            assert after.groups == case.prefix + [57, 57, 48, 24][layer]
            tokens = torch.cat([prefix, patches], 1)
            assert torch.equal(after.unmerge(after.merge(tokens, "drop")), tokens)
        images = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True, stop_early=True)
        assert [image.shape for image in images] == 2 * [(2, 24, 8, 8)]
        torch.testing.assert_close(images[0].flatten(2).mT, each[1][0])


def test_average_pooling_counts_each_patch_once():
    model = CASES["timm qk-norm, average pooling"].build()
    tome.apply_patch(model, trace_source=True)
    model.r = SCHEDULE
    with torch.no_grad():
        features = model.forward_features(tiny_vit.images())
        merged = tome.source(model)
        tokens, sizes = merged.merge(features, "drop"), merged.sizes
        mean = (tokens * sizes[..., None])[:, 1:].sum(1) / 64
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), model.fc_norm(mean))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("transformers")])
def test_hidden_states_and_attentions_of_transformers_come_back_on_the_original_grid(name, attention):
    case = CASES[name]
    model = case.build()
    model.set_attn_implementation(attention)
    wanted = dict(output_hidden_states=True, output_attentions=attention == "eager")
    with torch.no_grad():
        plain = case.run(model, **wanted)
        tome.patch.transformers(model)
        zero = case.run(model, **wanted)
        assert all(map(torch.equal, zero.hidden_states, plain.hidden_states))
        model.r = SCHEDULE
        merged = case.run(model, **wanted)
        torch.testing.assert_close(tiny_vit.logits(merged), case(model))
    assert [h.shape for h in merged.hidden_states] == [h.shape for h in plain.hidden_states]
    if attention == "eager":
        assert [a.shape for a in merged.attentions] == [a.shape for a in plain.attentions]
        torch.testing.assert_close(merged.attentions[0], plain.attentions[0])
        for weights in merged.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("name", ["ViTPose", "FLAVA", "MGP-STR"])
def test_attentions_that_blocks_hand_on_come_back_on_the_original_grid(name):
    case = tiny_vit.ALIKE[f"transformers {name}"]
    model = case.build()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = case.run(model, output_attentions=True).attentions
        tome.set_r(tome.apply_patch(model), SCHEDULE)
        merged = case.run(model, output_attentions=True).attentions
    assert [a.shape for a in merged] == [a.shape for a in plain]
    torch.testing.assert_close(merged[0], plain[0])
    torch.testing.assert_close(merged[-1].sum(-1), torch.ones(plain[-1].shape[:-1]))


def test_hidden_states_can_be_saved():
    case = CASES["transformers DINOv2"]
    model = tome.apply_patch(case.build())
    model.r = SCHEDULE
    with torch.no_grad():
        states = case.run(model, output_hidden_states=True).hidden_states
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    assert all(map(torch.equal, torch.load(file, weights_only=True), states))


def test_backbones_give_maps_on_the_original_grid():
    import transformers as T

    config = T.Dinov2Config(**tiny_vit.CONFIG, mlp_ratio=2, out_features=["stage1", "stage4"])
    model = tome.apply_patch(tiny_vit.randomised(T.Dinov2Backbone(config)))
    model.r = 8
    with torch.no_grad():
        maps = model(tiny_vit.images()).feature_maps
    assert [m.shape for m in maps] == 2 * [(2, 24, 8, 8)]


def test_only_the_vision_half_of_clip_merges():
    import transformers as T

    config = T.CLIPConfig(
        text_config=dict(hidden_size=24, num_attention_heads=3, intermediate_size=32, num_hidden_layers=2),
        vision_config=tiny_vit.CONFIG,
        projection_dim=16,
    )
    model = tiny_vit.randomised(T.CLIPModel(config))
    ids = torch.arange(7)[None]
    with torch.no_grad():
        plain = model(ids, tiny_vit.images())
        tome.apply_patch(model)
        model.r = 8
        merged = model(ids, tiny_vit.images())
    assert torch.equal(merged.text_embeds, plain.text_embeds)
    assert not torch.equal(merged.image_embeds, plain.image_embeds)


@pytest.mark.parametrize("name", ["timm ViT", "timm EVA02", "transformers DINOv2", "transformers CLIP"])
def test_checkpointing_recomputes_each_of_several_forwards_as_it_was(name):
    case = CASES[name]
    model = tome.apply_patch(case.build()).train()
    small, large = tiny_vit.images(2), 2 * tiny_vit.images(3)

    def run():
        model.zero_grad()
        losses = []
        for r, x in ((SCHEDULE, small), (SCHEDULE, large), (0, small)):
            model.r = r
            losses.append(tiny_vit.logits(model(x)).square().mean())
        model.r = SCHEDULE
        (losses[0] + losses[1]).backward()
        model.r = 0
        losses[2].backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    want = run()
    checkpoint(model)
    run()
    copy.deepcopy(model)  # nothing with a history is left on it
    for got, grad in zip(run(), want, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


def test_what_comes_between_blocks_is_an_error_not_a_wrong_result():
    model = tome.apply_patch(CASES["timm ViT"].build())
    model.r = 8
    handle = model.blocks[1].register_forward_hook(lambda m, args, out: out + 0)
    with pytest.raises(RuntimeError, match=r"blocks\.2 do not come straight"):
        model(tiny_vit.images())
    handle.remove()
    model(tiny_vit.images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_and_autocast(name, dtype):
    case = CASES[name]
    model = tome.apply_patch(case.build())
    model.r = SCHEDULE
    with torch.no_grad():
        assert case(model.to(dtype)).isfinite().all()
        model.float()
        want = case(model)
        with torch.autocast("cpu", dtype):
            got = case(model)
    assert got.isfinite().all()
    assert F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.7


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("name", ["timm ViT", "torchvision", "transformers ViT", "transformers DINOv2"])
def test_exports(name, prop_attn):
    case = CASES[name]
    model = tome.apply_patch(case.build(), prop_attn=prop_attn)
    model.r = SCHEDULE
    x = tiny_vit.images()
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(tiny_vit.logits(exported(x)), case(model))


def test_timm_without_fused_attention_merges_alike():
    case = CASES["timm ViT"]
    model = tome.apply_patch(case.build())
    model.r = SCHEDULE
    with torch.no_grad():
        fused = case(model)
        for block in model.blocks:
            block.attn.fused_attn = False
        torch.testing.assert_close(case(model), fused, rtol=1e-4, atol=1e-5)


def test_data_parallel_training_in_two_processes(tmp_path):
    workers = torch.multiprocessing.spawn(ddp_worker.train, (str(tmp_path), SCHEDULE), nprocs=2, join=False)
    try:
        end = time.monotonic() + 180
        while not workers.join(timeout=1):
            assert time.monotonic() < end, "a process hangs"
    finally:
        for process in workers.processes:
            process.kill()
    model, images = ddp_worker.build(SCHEDULE)
    model(images).square().mean().backward()
    for got, weight in zip(torch.load(tmp_path / "grads.pt"), model.parameters(), strict=True):
        torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-6)


def test_fine_tuning_with_merging_converges_through_accelerate():
    """Two classes of images, told apart by where a bright square is."""
    from accelerate import Accelerator

    model = tome.patch.timm(CASES["timm ViT"].build(), prop_attn=False)
    model.r = SCHEDULE
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(64, 3, 32, 32, generator=generator)
    labels = torch.arange(64) % 2
    images[labels == 1, :, 8:16, 8:16] += 1
    loader = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=16)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(12):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: timm().create_model("swin_tiny_patch4_window7_224"), "windows of the whole grid"),
        (lambda: vitdet(), "windows of the whole grid"),
        (lambda: qwen(), "joins each 2 x 2 patches in the end"),
        (lambda: timm().create_model("beit_base_patch16_224", depth=1), "bias for each pair of positions"),
        (lambda: timm().create_model("vit_relpos_small_patch16_224", depth=1), "bias for each pair"),
        (lambda: timm().models.Xcit(embed_dim=48, num_heads=3, depth=1), "among channels"),
        (lambda: timm().models.MlpMixer(num_blocks=1), "a table of weights"),
        (
            lambda: timm().create_model("resnet18"),
            r"ResNet holds no vision transformer.*shrinks from stage to stage.*Known are timm Vision",
        ),
        (
            lambda: without_a_block(),
            "blocks.0 of VisionTransformer is a Identity; of timm VisionTransformer tomesd knows Block, ResP",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_with_a_reason(build, reason):
    model = build()
    with pytest.raises(ValueError, match=reason):
        tome.apply_patch(model)
    no_traces(model)


@pytest.mark.parametrize(
    ("path", "options", "reason"),
    [
        ("x_clip.XCLIPVisionModel", {}, "join those of the image"),
        ("eomt.EomtForUniversalSegmentation", {}, "join those of the image"),
        ("groupvit.GroupViTVisionModel", {"depths": [1, 1, 1]}, "stages group"),
        ("align.AlignVisionModel", {}, "convolutions"),
        ("mlcd.MLCDVisionModel", {}, "one table"),
        ("vjepa2.VJEPA2Model", {}, "place of a token"),
        ("timesformer.TimesformerModel", {}, "by frame and place"),
        ("mllama.MllamaVisionModel", {"num_global_layers": 1}, "mask of each image"),
        ("siglip2.Siglip2VisionModel", {}, "mask of each image"),
        ("got_ocr2.GotOcr2VisionEncoder", {}, "windows"),
        ("yolos.YolosModel", {}, "embeddings of all positions to the tokens between blocks"),
        ("vilt.ViltModel", {}, "tokens of a text"),
        ("minicpmv4_6.MiniCPMV4_6VisionModel", {}, "joins each 2 x 2"),
        ("qwen3_5.Qwen3_5VisionModel", {"depth": 1}, "knows: it packs images"),  # by a sign, as all alike
    ],
)
def test_networks_of_transformers_that_do_not_fit_say_why(path, options, reason):
    folder, _, name = path.partition(".")
    kind = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    with torch.device("meta"):
        model = kind(kind.config_class(**{"num_hidden_layers": 1, **options}))
    with pytest.raises(ValueError, match=reason):
        tome.apply_patch(model)
    no_traces(model)


def test_a_network_without_the_model_that_chooses_its_attention_is_eager():
    from transformers.models.git.modeling_git import GitVisionConfig, GitVisionTransformer

    model = tiny_vit.randomised(GitVisionTransformer(GitVisionConfig(**tiny_vit.CONFIG)))
    assert model.config._attn_implementation is None
    tome.set_r(tome.apply_patch(model), SCHEDULE)
    merged = model(tiny_vit.images()).last_hidden_state
    model.config._attn_implementation = "sdpa"
    torch.testing.assert_close(model(tiny_vit.images()).last_hidden_state, merged, rtol=1e-4, atol=1e-5)


def test_masks_and_packs_of_images_are_refused():
    case = tiny_vit.ALIKE["transformers SmolVLM"]
    model = tome.apply_patch(case.build())
    model.r = 4
    padded = torch.ones(2, 8, 8, dtype=torch.bool)
    merged = case.run(model, patch_attention_mask=padded)[0]  # hides nothing
    hides_nothing = {"attention_mask": torch.zeros(2, 1, 1, 64)}  # as under torch.compile, where nobody looks
    handle = model.encoder.register_forward_pre_hook(lambda m, a, k: (a, k | hides_nothing), with_kwargs=True)
    torch.testing.assert_close(case.run(model)[0], merged)
    handle.remove()
    padded[0, :, 6:] = False
    with pytest.raises(ValueError, match="was given an attention mask"):
        case.run(model, patch_attention_mask=padded)
    radio = tome.apply_patch(tiny_vit.ALIKE["transformers RADIO"].build())
    radio.r = 4
    patches = torch.randn(1, 2 * 64, 48)
    with pytest.raises(ValueError, match="was given packed images"):
        radio(patches, image_grid_hw=torch.tensor([[8, 8], [8, 8]]))


def no_traces(model):
    assert traces(model) == []


def call_of(case, model):
    """What comes out of the last block in a forward of the model."""
    seen = []
    handle = case.blocks(model)[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        case.run(model)
    handle.remove()
    return seen[0]


def checkpoint(model):
    getattr(model, "set_grad_checkpointing", getattr(model, "activation_checkpointing_enable", None))()


def timm():
    import timm

    return timm


def vitdet():
    import transformers as T

    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4)
    return T.VitDetModel(T.VitDetConfig(**sizes, window_size=4, window_block_indices=[0]))


def qwen():
    from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    sizes = dict(depth=2, hidden_size=24, num_heads=2, intermediate_size=48, out_hidden_size=24)
    return Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLConfig(vision_config=sizes).vision_config)


def without_a_block():
    model = CASES["timm ViT"].build()
    model.blocks[0] = torch.nn.Identity()
    return model


def test_errors_name_what_was_given():
    model = CASES["timm ViT"].build()
    with pytest.raises(TypeError, match="expected a torch module, got str"):
        tome.apply_patch("vit_base_patch16_224")
    with pytest.raises(TypeError, match="got the class VisionTransformer: make one first"):
        tome.apply_patch(type(model))
    with pytest.raises(TypeError, match="prop_attn must be a bool or None, got 1"):
        tome.apply_patch(model, prop_attn=1)
    with pytest.raises(ValueError, match="metric must be one of tokens, keys, got 'k'"):
        tome.apply_patch(model, metric="k")
    with pytest.raises(ValueError, match="mode must be one of mlerp, mean, got 'max'"):
        tome.patch.timm(model, mode="max")
    with pytest.raises(ValueError, match=r"of swag that tomesd knows\. Known are torchvision or SWAG"):
        tome.patch.swag(model)
    no_traces(model)
    with pytest.raises(ValueError, match="patch the model with trace_source=True"):
        tome.source(tome.apply_patch(model))
    tome.apply_patch(model, trace_source=True)
    with pytest.raises(RuntimeError, match="run the model first"):
        tome.source(model)
    model.r = -1
    with pytest.raises(ValueError, match="r must not be negative, got -1"):
        model(tiny_vit.images())
    model.r = [1] * 5
    with pytest.raises(ValueError, match="5 numbers for 4 layers"):
        model(tiny_vit.images())
    model.r = 8
    with pytest.raises(ValueError, match=r"blocks\.0 was given an attention mask"):
        model.forward_features(tiny_vit.images(), attn_mask=torch.ones(65, 65, dtype=torch.bool))
    with torch.no_grad():
        assert model(tiny_vit.images()).isfinite().all()


def test_the_notebook_of_the_older_package_runs_with_another_import(capsys):
    model = timm().create_model("vit_tiny_patch16_224", img_size=64, depth=4)
    plain = tome.utils.benchmark(model, device="cpu", runs=4, batch_size=2, input_size=(3, 64, 64))
    tome.patch.timm(model, trace_source=True)
    x = torch.randn(1, 3, 64, 64)
    for r, left in ((0, 17), (2, 9), ((2, -1.0), 10), ([3] * 2, 11)):
        model.r = r
        model(x)[0].topk(5)
        assert model._tome_info["source"].shape == (1, left, 17)
    merged = tome.utils.benchmark(
        model, device="cpu", verbose=True, runs=4, batch_size=2, input_size=(3, 64, 64), throw_out=0.25
    )
    assert plain > 0
    assert f"{merged:.2f} im/s" in capsys.readouterr().out


class Dropped(torch.nn.Module):
    """Stochastic depth or dropout that drops everything."""

    def forward(self, x):
        return 0 * x


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("timm ViT", ["drop_path1", "drop_path2"]),
        ("timm EVA02", ["drop_path1", "drop_path2"]),
        ("transformers ViT", ["dropout"]),
        ("transformers DINOv2", ["drop_path"]),
    ],
)
def test_what_drops_a_half_of_a_block_does_not_drop_the_merging(name, parts):
    case = CASES[name]
    model = case.build()
    for block in case.blocks(model):
        for part in parts:
            assert part in dict(block.named_children())
            setattr(block, part, Dropped())
    before = call_of(case, model)
    tome.apply_patch(model, trace_source=True, mode="mean")
    model.r = SCHEDULE
    after = call_of(case, model)
    merged = tome.source(model)
    torch.testing.assert_close(after, merged.unmerge(merged.merge(before)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("timm ViT", ["drop_path1", "drop_path2"]),  # hand on merged tokens
        ("timm EVA02", ["drop_path1", "drop_path2"]),  # give back all
        ("transformers DINOv2", ["drop_path"]),
    ],
)
@pytest.mark.parametrize("mode", ["mean", "mlerp"])
def test_residuals_give_back_what_merging_alone_has_hidden(name, parts, mode):
    """Where blocks add nothing, all tokens come back as they were."""
    case = CASES[name]
    model = case.build()
    for block in case.blocks(model):
        for part in parts:
            setattr(block, part, Dropped())
    before = call_of(case, model)
    tome.apply_patch(model, mode=mode, unmerge="residual")
    model.r = SCHEDULE
    torch.testing.assert_close(call_of(case, model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["timm ViT", "timm parallel", "transformers DINOv3", "torchvision"])
def test_residuals_change_nothing_but_what_is_given_back(name):
    case = CASES[name]
    model = tome.apply_patch(case.build(), trace_source=True)
    model.r = SCHEDULE
    with torch.no_grad():
        want, dense = case(model), call_of(case, model)
        merged = tome.source(model)
        tome.apply_patch(model, unmerge="residual", mode="mlerp")
        model.r = SCHEDULE
        torch.testing.assert_close(case(model), want, rtol=1e-4, atol=1e-4)
        got = call_of(case, model)
    assert (got - dense)[:, : case.prefix].abs().max() < 1e-4
    apart = (got - dense)[merged.unmerge(merged.sizes) > 1]
    assert (apart.norm(dim=-1) > 0.01).all()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("timm", "transformers"))])
def test_reentrant_checkpointing_is_an_error_not_a_wrong_gradient(name):
    case = CASES[name]
    model = tome.apply_patch(case.build().train())
    model.r = SCHEDULE
    if name.startswith("timm"):
        x = torch.randn(2, 65, 24, requires_grad=True)

        def run():
            out = x
            for block in model.blocks:
                out = torch.utils.checkpoint.checkpoint(block, out, use_reentrant=True)
            return out
    else:
        model.activation_checkpointing_enable({"use_reentrant": True})

        def run():
            return tiny_vit.logits(case.run(model))

    with pytest.raises(RuntimeError, match="use_reentrant=False works"):
        run().square().mean().backward()


class Moved(accelerate.hooks.ModelHook):
    """Gives a module copies of its inputs, as accelerate does for one on another device."""

    def pre_forward(self, module, *args, **kwargs):
        return tuple(x.clone() if torch.is_tensor(x) else x for x in args), kwargs


@pytest.mark.parametrize("name", ["timm ViT", "timm EVA02", "transformers DINOv2", "transformers CLIP"])
def test_inputs_that_accelerate_moves_merge_alike(name):
    case = CASES[name]
    model = tome.apply_patch(case.build())
    model.r = SCHEDULE
    with torch.no_grad():
        want = case(model)
        accelerate.hooks.add_hook_to_module(case.blocks(model)[2], Moved())
        torch.testing.assert_close(case(model), want)


def test_feature_extraction_by_tracing_is_an_error():
    from torchvision.models.feature_extraction import create_feature_extractor

    for name, node in (
        ("torchvision", "encoder.layers.encoder_layer_1.add_1"),
        ("timm ViT", "blocks.1.add_1"),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.fx does not see"):
            create_feature_extractor(tome.apply_patch(CASES[name].build()), [node])


def test_other_attention_implementations_are_refused_by_name():
    case = CASES["transformers DINOv3"]
    model = tome.apply_patch(case.build())
    model.r = 8
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), pytest.raises(ValueError, match="flex_attention takes no sizes of tokens"):
        case(model)


@pytest.mark.parametrize("name", ["timm ViT", "torchvision"])
def test_a_shortened_model_gives_back_all_tokens(name):
    case = CASES[name]
    model = tome.apply_patch(case.build())
    model.r = SCHEDULE
    layers = model.blocks if name == "timm ViT" else model.encoder.layers
    del layers[-1]
    assert layers(torch.randn(2, 65, 24)).shape == (2, 65, 24)


@pytest.mark.parametrize("name", ["timm ViT", "torchvision"])
def test_hooks_of_users_see_the_original_grid(name):
    case = CASES[name]
    model = tome.apply_patch(case.build())
    model.r = SCHEDULE
    with torch.no_grad():
        want = case(model)
        seen = []
        case.blocks(model)[1].register_forward_hook(lambda m, args, out: seen.append(out.shape))
        torch.testing.assert_close(case(model), want)
    assert seen == [(2, 65, 24)]


def test_r_may_be_set_on_the_network_too_and_is_nobody_elses():
    case = CASES["transformers ViT"]
    model = tome.apply_patch(case.build())
    with torch.no_grad():
        model.r = 8
        want = case(model)
        model.r = 0
        model.vit.r = 8
        assert torch.equal(case(model), want)
        tome.apply_patch(model.vit)
        assert model.vit.r == 0
        tome.remove_patch(model)
    no_traces(model)
    model.r = 0.5
    with pytest.raises(ValueError, match="ViTForImageClassification has an attribute r of its own"):
        tome.apply_patch(model)
    assert model.r == 0.5


def test_two_networks_in_a_model():
    short = tiny_vit.randomised(timm().models.VisionTransformer(**{**tiny_vit.TIMM, "depth": 2}))
    both = torch.nn.ModuleDict({"student": short, "teacher": CASES["timm ViT"].build()})
    tome.apply_patch(both, trace_source=True)
    x = tiny_vit.images()
    with torch.no_grad():
        both.r = [8, 4]
        both.student(x)
        both.teacher(x)
        assert tome.source(both.student).groups == tome.source(both.teacher).groups == 65 - 12
        with pytest.raises(ValueError, match="holds 2 vision transformers: pass one of them"):
            tome.source(both)
        both.r = [8, 4, 2]
        with pytest.raises(ValueError, match="student: r has 3 numbers for 2 layers"):
            both.student(x)
        tome.remove_patch(both.student)
        both.student(x)
        both.teacher(x)
        assert tome.source(both.teacher).groups == 65 - 14
    tome.remove_patch(both)
    no_traces(both)


def test_sources_are_of_the_last_forward_and_of_known_layers():
    model = tome.apply_patch(CASES["timm ViT"].build(), trace_source=True)
    model.r = 8
    x = tiny_vit.images()
    with torch.no_grad():
        model(x)
        model.forward_intermediates(x, indices=[1], stop_early=True)
        assert tome.source(model, 1).groups == 65 - 16
        with pytest.raises(RuntimeError, match="no sources yet"):
            tome.source(model)
    assert tome.source(model, np.int64(1)).groups == 65 - 16
    with pytest.raises(TypeError, match="layer must be an integer, got 'a'"):
        tome.source(model, "a")
    for layer in (4, -5):
        with pytest.raises(ValueError, match="layer must be from -4 to 3, got"):
            tome.source(model, layer)
    with pytest.raises(KeyError, match="'sizes' is none of r, size, source"):
        model._tome_info["sizes"]


def test_a_compiled_model_can_be_patched():
    case = CASES["timm ViT"]
    model = case.build()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert tome.apply_patch(compiled) is compiled
    with torch.no_grad():
        model.r = SCHEDULE
        torch.testing.assert_close(case(compiled), case(model))
        tome.remove_patch(compiled)
    no_traces(model)


@pytest.mark.parametrize("name", ["timm ViT", "transformers DINOv3"])
def test_compiles_once_more_for_all_other_batch_sizes(name):
    from torch._dynamo.testing import CompileCounter

    case = CASES[name]
    model = tome.apply_patch(case.build())
    model.r = SCHEDULE
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in range(2, 8):
            torch.testing.assert_close(case(compiled, batch), case(model, batch), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_exports_with_any_batch_size():
    case = CASES["timm ViT"]
    model = tome.apply_patch(case.build())
    model.r = SCHEDULE
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (tiny_vit.images(),), dynamic_shapes=({0: batch},)).module()
        for size in (2, 5):
            x = tiny_vit.images(size)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def test_masks_of_transformers_are_refused_until_the_next_call_without_one():
    case = CASES["transformers ViT"]
    model = tome.apply_patch(case.build())
    model.r = 8
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[:, -5:] = 0
    with torch.no_grad():
        want = case(model)
        with pytest.raises(ValueError, match="was given an attention mask"):
            model.vit(tiny_vit.images(), attention_mask=mask)
        assert torch.equal(case(model), want)
