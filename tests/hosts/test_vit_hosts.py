"""What people do around a patched vision transformer: replace, copy, wrap, share, script and export it."""

import copy
import functools
import io
import sys
import types
from dataclasses import replace

import pytest
import tiny_vit
import torch
from subjects import traces
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import tomesd.vit as tome
from tomesd.hosts import vits

pytestmark = pytest.mark.usefixtures("no_grad")
CASES = tiny_vit.CASES
TIMM = CASES["timm ViT"]
X = tiny_vit.images()


def build(**options):
    return tiny_vit.randomised(VisionTransformer(**{**tiny_vit.TIMM, **options}))


def patched(model=None, r=6, **options):
    model = tome.apply_patch(TIMM.build() if model is None else model, **options)
    model.r = r
    return model


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    return file


def loaded(file):
    file.seek(0)
    return torch.load(file, weights_only=False)


# Replaced, wrapped and copied parts


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name in ("timm ViT", "transformers CLIP", "torchvision") for part in range(4)],
)
@pytest.mark.parametrize("how", ["fresh", "copy", "wrapped twice"])
def test_a_part_that_was_replaced_is_named(name, part, how):
    case = CASES[name]
    model = case.build()
    paths = {
        "timm ViT": ("norm1", "attn", "norm2", "drop_path2"),
        "transformers CLIP": ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
        "torchvision": ("ln_1", "self_attention", "ln_2", "mlp"),
    }[name]
    patched(model)
    for block, fresh in zip(case.blocks(model), case.blocks(case.build()), strict=True):
        old = getattr(block, paths[part])
        copied = copy.deepcopy(old)
        new = {"fresh": getattr(fresh, paths[part]), "copy": copied, "wrapped twice": TrainsACopy(old)}[how]
        setattr(block, paths[part], new)
    with pytest.raises(RuntimeError, match=rf"0\.{paths[part]} was replaced after apply_patch.*patch again"):
        case(model)
    model.r = 0
    torch.testing.assert_close(case(model), case(case.build()))
    if how != "wrapped twice" or part != 1:  # whose forward does not say what attention takes
        patched(model)
        case(model)
    tome.remove_patch(model)
    assert traces(model) == []


class TrainsACopy(nn.Module):
    """As peft's modules_to_save and LNTuning."""

    def __init__(self, part):
        super().__init__()
        self.original, self.trained = part, copy.deepcopy(part)

    def forward(self, *args, **kwargs):
        return self.trained(*args, **kwargs)


class Adapter(nn.Module):
    """As LoRA of a whole part, still at zero."""

    def __init__(self, part):
        super().__init__()
        self.part, self.more = part, nn.Linear(24, 24, bias=False)
        nn.init.zeros_(self.more.weight)

    def forward(self, x, *args, **kwargs):
        return self.part(x, *args, **kwargs) + self.more(x)


@pytest.mark.parametrize("part", ["attn", "norm1", "mlp"])
def test_an_adapter_around_a_part_merges_alike(part):
    model = patched()
    want = model(X)
    for block in model.blocks:
        setattr(block, part, Adapter(getattr(block, part)))
    torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("part", ["norm2", "drop_path2"])
def test_an_adapter_that_would_see_all_tokens_beside_merged_ones_is_refused(part):
    model = patched()
    for block in model.blocks:
        setattr(block, part, Adapter(getattr(block, part)))
    with pytest.raises(RuntimeError, match=f"{part} was replaced after apply_patch, by a Adapter"):
        model(X)


def replace_one(model):
    model.blocks[1] = TIMM.build().blocks[1]


def replace_by_copy(model):
    model.blocks[1] = copy.deepcopy(model.blocks[0])


def replace_all(model):
    model.blocks = TIMM.build().blocks


def append(model):
    model.blocks.append(TIMM.build().blocks[0])


@pytest.mark.parametrize("change", [replace_one, replace_by_copy, replace_all, append])
@pytest.mark.parametrize("call", ["__call__", "forward_features"])
def test_a_block_that_came_after_the_patch_is_named(change, call):
    model = patched()
    change(model)
    with pytest.raises(RuntimeError, match=r"blocks\.\d came after apply_patch"):
        getattr(model, call)(X)
    patched(model)
    model(X)


def test_peft_that_trains_copies_is_named_and_works_when_patched_again():
    peft = pytest.importorskip("peft")
    case = CASES["transformers CLIP"]
    norms = ["layer_norm1", "layer_norm2"]
    want = case(patched(case.build()))
    for config in (
        peft.LNTuningConfig(target_modules=norms),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=norms),
    ):
        model = peft.get_peft_model(patched(case.build()), config).eval()
        with pytest.raises(RuntimeError, match="layer_norm2 was replaced after apply_patch"):
            case(model)
        patched(model)
        torch.testing.assert_close(case(model), want)
        tome.remove_patch(model)
        assert set(traces(model)) <= {"r"}  # that of LoRA
    model = peft.get_peft_model(patched(case.build()), peft.LoraConfig(target_modules=["q_proj", "fc1"]))
    torch.testing.assert_close(case(model.eval()), want)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda part: loaded(saved(part))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("path", ["blocks.1.norm2", "blocks.1", "blocks"])
def test_a_copy_of_a_part_carries_neither_patch_nor_model(path, how):
    model, plain = TIMM.build(), TIMM.build().get_submodule(path)
    x = torch.randn(2, 65, 24)
    small = saved(plain).tell()
    patched(model)
    want = model(X)
    part = model.get_submodule(path)
    assert saved(part).tell() < 1.5 * small
    twin = how(part)
    assert torch.equal(twin(x), plain(x))
    assert torch.equal(model(X), want)
    assert traces(tome.remove_patch(twin)) == []


class Both(nn.Module):
    """A model with more in it than a vision transformer."""

    def __init__(self):
        super().__init__()
        self.visual, self.text = TIMM.build(), nn.Linear(500, 500)

    def forward(self, x):
        return self.visual(x)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda part: loaded(saved(part))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_tower_merges_without_the_model_around_it(how):
    model = patched(Both())
    want, plain = model(X), TIMM.build()(X)
    assert saved(model.visual).tell() < 500**2
    tower, whole = how(model.visual), how(model)
    model.r = 0
    assert torch.equal(tower(X), want)
    tome.set_r(tower, 0)
    assert torch.equal(tower(X), plain)
    assert torch.equal(whole(X), want)
    whole.r = 0
    assert torch.equal(whole(X), plain)
    for copied in (tower, whole):
        assert traces(tome.remove_patch(copied)) == []
    model.r = 6
    assert torch.equal(model(X), want)


def test_a_part_computed_again_without_its_block_is_an_error_not_a_wrong_gradient():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = patched()
    with torch.enable_grad():
        want = torch.autograd.grad(model(X).sum(), model.patch_embed.proj.weight)
        for block in model.blocks:
            block.attn = checkpoint_wrapper(block.attn)
        with pytest.raises(RuntimeError, match="computed again in the backward pass, without its block"):
            model(X).sum().backward()
        patched(model)
        got = torch.autograd.grad(model(X).sum(), model.patch_embed.proj.weight)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# r below wrappers


def test_set_r_reaches_every_patch_below_a_wrapper():
    model = patched(r=0)
    plain = model(X)
    want = patched()(X)
    wrapped = nn.DataParallel(model)
    assert tome.set_r(wrapped, 6) is wrapped
    assert torch.equal(wrapped(X), want)
    assert model.r == 6
    model.r = 0  # which is what holds it still
    assert torch.equal(wrapped(X), plain)
    with pytest.raises(ValueError, match="r has 5 numbers for 4 layers"):
        tome.set_r(wrapped, [1] * 5)
    assert model.r == 0
    with pytest.raises(ValueError, match="Linear holds no patched vision transformer"):
        tome.set_r(nn.Linear(2, 2), 8)
    with pytest.raises(TypeError, match="expected a torch module, got str"):
        tome.set_r("model", 8)


def test_set_r_of_what_is_left_of_a_wrapper():
    """peft's merge_and_unload throws away the model that was patched."""
    model = patched(Both())
    plain = TIMM.build()(X)
    tome.set_r(model.visual, 0)
    assert torch.equal(model(X), plain)
    assert model.r == 6
    tome.set_r(model, 6)
    assert not torch.equal(model(X), plain)
    assert "r" not in vars(model.visual)


def test_a_wrapper_of_a_patched_model_can_be_patched_and_one_with_an_r_is_told_how():
    model = patched()
    want = model(X)
    wrapped = Forwarding(model)
    assert wrapped.r == 6
    assert torch.equal(patched(wrapped)(X), want)
    assert "r" not in vars(model)
    tome.remove_patch(wrapped)
    patched(model)
    wrapped.r = 8
    with pytest.raises(ValueError, match=r"Forwarding has an attribute r of its own.*tome\.set_r"):
        tome.apply_patch(wrapped)


class Forwarding(nn.Module):
    """Shows the attributes of the module in it, as FSDP and peft do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x)


# Blocks with a forward of their own


class Parallel(Block):
    def forward(self, x, attn_mask=None, **_):
        h = self.norm1(x)
        return x + self.attn(h) + self.drop_path2(self.mlp(h))


class Macaron(Block):
    def forward(self, x, attn_mask=None, **_):
        x = x + self.mlp(self.norm2(x))
        return x + self.drop_path2(self.attn(self.norm1(x)))


class WithoutAttention(Block):
    def forward(self, x, attn_mask=None, **_):
        return x + self.drop_path2(self.mlp(self.norm2(self.norm1(x))))


class ClassToken(Block):
    def forward(self, x, attn_mask=None, **_):
        x = x + self.attn(self.norm1(x))
        return torch.cat([x[:, :1] + self.drop_path2(self.mlp(self.norm2(x[:, :1]))), x[:, 1:]], 1)


class Windows(Block):
    def forward(self, x, attn_mask=None, **_):
        patches = self.norm1(x)[:, 1:].reshape(-1, 16, 24)
        x = x + torch.cat([x[:, :1], self.attn(patches).reshape(len(x), -1, 24)], 1)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ForAPart(Block):
    def forward(self, x, attn_mask=None, **_):
        h = self.norm1(x)
        x = x + torch.cat([self.attn(h[:1]), h[1:]])
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Twice(Block):
    def forward(self, x, attn_mask=None, **_):
        x = x + self.attn(self.norm1(x))
        return x + self.drop_path2(self.mlp(self.norm2(x))) + self.norm2(x)


class Tuple(Block):
    def forward(self, x, attn_mask=None, **_):
        return super().forward(x), None


class Restated(Block):
    def forward(self, x, attn_mask=None, **_):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Parallel, r"blocks\.0 did not call its norm2.*Parallel has a forward of its own"),
        (Macaron, r"blocks\.0 did not call its norm2, or not in the order that is known"),
        (WithoutAttention, r"blocks\.0 did not call its attn"),
        (ClassToken, r"blocks\.0\.norm2, where its tokens \[2, 65\] merge, was given \[2, 1, 24\]"),
        (Windows, r"blocks\.0\.attn was given \[8, 16, 24\] of the block's tokens \[2, 65\]"),
        (ForAPart, r"blocks\.0\.attn was given \[1, 65, 24\] of the block's tokens \[2, 65\]"),
        (Twice, r"blocks\.0\.norm2.*was given \[2, 65, 24\] once more"),
        (Tuple, r"blocks\.1\.forward was given a tuple where its tokens \[B, N, C\] are expected"),
    ],
)
def test_blocks_with_a_forward_of_their_own_are_never_plain_in_silence(kind, reason):
    model = patched(build(block_fn=kind), r=0)
    if kind is not Tuple:
        plain = model(X)
        assert torch.equal(plain, build(block_fn=kind)(X))
    model.r = 6
    with pytest.raises(RuntimeError, match=reason):
        model(X)
    if kind is not Tuple:
        model.r = 0
        assert torch.equal(model(X), plain)


class Short(Block):
    def forward(self, x, attn_mask=None, **_):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def short_eva(self, x, rope=None, attn_mask=None, **_):
    x = x + self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask)
    return x + self.mlp(self.norm2(x))


def short_vit(self, hidden_states, *_, **__):
    x = hidden_states + self.attention(self.layernorm_before(hidden_states))[0]
    return x + self.mlp(self.layernorm_after(x))


def short_dino(self, hidden_states, *_, **__):
    x = hidden_states + self.layer_scale1(self.attention(self.norm1(hidden_states))[0])
    return x + self.layer_scale2(self.mlp(self.norm2(x)))


@pytest.mark.parametrize("kind", [Restated, Short])
def test_a_restated_forward_merges_as_the_one_it_restates(kind):
    torch.testing.assert_close(patched(build(block_fn=kind))(X), patched()(X))


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("timm EVA02", short_eva),
        ("transformers ViT", short_vit),
        ("transformers DINOv2", short_dino),
        ("timm ViT", Short.forward),
    ],
)
@pytest.mark.parametrize("bind", [types.MethodType, lambda f, block: functools.partial(f, block)])
def test_a_forward_of_its_own_may_leave_out_what_does_nothing(name, forward, bind):
    case = CASES[name]
    model, other = case.build(), case.build()
    for block in case.blocks(model):
        block.forward = bind(forward, block)
        if hasattr(block, "gamma_1"):
            block.gamma_1 = block.gamma_2 = None
    for block in case.blocks(other):
        if hasattr(block, "gamma_1"):
            block.gamma_1 = block.gamma_2 = None
    torch.testing.assert_close(case(patched(model)), case(patched(other)))


def share_block(model):
    model.blocks[2] = model.blocks[1]


def share_norm(model):
    model.blocks[2].norm1 = model.blocks[1].norm1


def share_norms(model):
    model.blocks[2].norm2 = model.blocks[2].norm1


@pytest.mark.parametrize("share", [share_block, share_norm, share_norms])
def test_shared_parts_are_refused_by_name(share):
    model = build()
    share(model)
    with pytest.raises(ValueError, match=r"blocks\.\d\S* and blocks\.2\S* of .* one and the same module"):
        tome.apply_patch(model)
    assert traces(model) == []


# Look-alikes and versions


class Attention(nn.Module):
    """As timm's was before 1.0.16, and as many write their own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Old(Restated):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attn = Attention()


def test_attention_that_takes_no_sizes_is_named_and_can_merge_without_them():
    model = build(block_fn=Old)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn takes no sizes of tokens: the forward of At"):
        tome.apply_patch(model)
    plain = model(X)
    assert not torch.allclose(patched(model, prop_attn=False)(X), plain)
    with pytest.raises(ValueError, match=r"keys of blocks\.0\.attn cannot be seen: Attention has no k_norm"):
        tome.apply_patch(model, prop_attn=False, metric="keys")


def of_package(monkeypatch, package, version, *classes):
    """Classes as if they were those of another version of a package."""
    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(__version__=version))
    for each in classes:
        monkeypatch.setattr(each, "__module__", f"{package}.models")


def test_versions_that_are_too_old_are_told_from_classes_of_others(monkeypatch):
    model = build(block_fn=Old)
    of_package(monkeypatch, "timm", "1.0.15", Attention)
    with pytest.raises(ValueError, match=r"tomesd needs timm >= 1\.0\.16 for it, installed is 1\.0\.15"):
        tome.apply_patch(model)
    other = ViTModel()
    with pytest.raises(ValueError, match=r"is a ViTModel as of .* ViT, .* no layers as transformers"):
        tome.apply_patch(other)
    of_package(monkeypatch, "transformers", "5.8.1", ViTModel)
    with pytest.raises(ValueError, match=r"no layers .*needs transformers >= 5\.9 .*, installed is 5\.8\.1"):
        tome.apply_patch(nn.ModuleDict({"vit": other}))


class ViTModel(nn.Module):
    """As transformers' was before 5.9."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2)


def test_floors_are_versions_of_packages_that_rows_name():
    for row in vits.FAMILIES:
        assert not row.since or row.package in ("timm", "transformers")


def test_a_look_alike_is_told_what_it_lacks():
    class VisionTransformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.Linear(2, 2)

    model = nn.ModuleDict({"known": TIMM.build(), "visual": VisionTransformer()})
    with pytest.raises(ValueError) as error:  # and known does not merge alone, in silence
        tome.apply_patch(model)
    assert "visual is a VisionTransformer as of timm VisionTransformer or torchvision" in str(error.value)
    assert "it is from test_vit_hosts): it has no blocks as timm VisionTransformer and it" in str(error.value)
    assert traces(model) == []
    model.visual.inner = TIMM.build()  # a wrapper by the name of what it holds
    patched(model)


def test_remove_patch_takes_off_what_is_there():
    timm = pytest.importorskip("timm")
    model = patched()
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    both = nn.ModuleDict({"known": model, "refused": swin})
    with pytest.raises(ValueError, match=r"the tokens of refused SwinTransformer .*alone: known"):
        tome.apply_patch(both)
    assert tome.remove_patch(both) is both
    assert traces(model) == []
    for unpatched in (swin, nn.Linear(2, 2)):
        assert tome.remove_patch(unpatched) is unpatched
    with pytest.raises(TypeError, match="expected a torch module, got str"):
        tome.remove_patch("model")


def test_packages_of_one_model_are_patched_apart():
    both = nn.ModuleDict({"one": TIMM.build(), "other": CASES["transformers ViT"].build()})
    tome.patch.timm(both)
    tome.patch.transformers(both)
    both.r = 6
    assert torch.equal(both.one(X), patched()(X))
    tome.remove_patch(both.other)
    assert torch.equal(both.one(X), patched()(X))
    tome.remove_patch(both)
    assert traces(both) == []


# Hooks of users, names of the ToMe package, TorchScript


def test_hooks_inside_of_blocks_can_read_their_tokens_on_the_grid():
    model = patched(trace_source=True)
    seen = []

    def see(module, args, output):
        assert output.shape == (2, 65 - 12, 24)
        seen.append(tome.source(model, 1).unmerge(output))

    model.blocks[2].norm1.register_forward_hook(see)
    model(X)
    assert seen[0].shape == (2, 65, 24)


def test_names_of_the_tome_package():
    from tomesd.vit.merge import bipartite_soft_matching, merge_source, merge_wavg

    x = torch.randn(2, 9, 4)
    merge, unmerge = bipartite_soft_matching(x, 2, class_token=True)
    merged, size = merge_wavg(merge, x)
    assert (merged.shape, size.shape, unmerge(merged).shape) == ((2, 7, 4), (2, 7, 1), x.shape)
    assert merge_source(merge, x).shape == (2, 7, 9)
    info = patched(trace_source=True)
    info(X)
    info = info._tome_info
    assert info["size"].shape == (2, 65 - 24, 1)
    assert info["size"].sum() == 2 * 65
    assert (info["class_token"], info["distill_token"]) == (True, False)
    assert patched(CASES["timm DeiT distilled"].build())._tome_info["distill_token"]
    assert patched(CASES["transformers DeiT"].build())._tome_info["distill_token"]
    assert not patched(CASES["timm SigLIP"].build())._tome_info["class_token"]
    with pytest.raises(ValueError, match="trace_source=True"):
        patched()._tome_info["size"]


@pytest.mark.filterwarnings("ignore")
def test_scripting_is_refused_and_tracing_works_for_any_batch():
    model = patched()
    for scripted in (model, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot read hooks: remove_patch first"):
            torch.jit.script(scripted)
    traced = torch.jit.trace(model, (X,))
    more = tiny_vit.images(3)
    torch.testing.assert_close(traced(more), model(more))
    tome.remove_patch(model)
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))


class Shortened(nn.Module):
    """A patched tower, and fewer of its tokens yet."""

    def __init__(self):
        super().__init__()
        self.tower = patched(r=[7, 0, 9, 40], trace_source=True)

    def forward(self, x):
        features = self.tower.forward_features(x)
        return tome.reduce(features, 16, prefix=1, source=tome.source(self.tower)).tokens


@pytest.mark.filterwarnings("ignore")
def test_the_exporter_writes_what_onnxruntime_runs(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model, batch = Shortened(), torch.export.Dim("batch", min=2, max=64)
    torch.onnx.export(model, (X,), dynamo=True, dynamic_shapes=({0: batch},)).save(tmp_path / "vit.onnx")
    session = ort.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    for size in (2, 3):
        x = tiny_vit.images(size)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"metric": "keys", "mode": "mean"}], ids=["layers", "as ToMe"])
@pytest.mark.filterwarnings("ignore")
def test_the_exporter_of_torchscript_writes_what_onnxruntime_runs(options):
    ort = pytest.importorskip("onnxruntime")
    ort.set_default_logger_severity(3)  # it warns of shapes that change with the batch
    model = patched(r=[7, 0, 9, 40], **options)
    file = io.BytesIO()
    torch.onnx.export(
        model, (X,), file, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
    )
    session = ort.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = tiny_vit.images(batch)
        (got,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-4)


# Families whose blocks are as those of one on which the laws run


@pytest.mark.parametrize("name", tiny_vit.ALIKE)
def test_families_that_are_alike_keep_the_laws_of_a_patch(name):
    case = tiny_vit.ALIKE[name]
    model = case.build()
    plain = case(model)
    patched(model, r=0)
    assert torch.equal(case(model), plain)
    model.r = [7, 0, 9, 20]
    merged = case(model)
    assert 0 < (merged - plain).norm() < plain.norm()
    assert torch.equal(case(copy.deepcopy(model)), merged)
    torch.testing.assert_close(case(model, 1)[0], merged[0], atol=1e-4, rtol=1e-3)
    tome.remove_patch(model)
    assert torch.equal(case(model), plain)
    assert traces(model) == []


def test_detection_tokens_after_the_patches_never_merge():
    case = CASES["transformers YOLOS"]
    model = patched(case.build(), r=[40, 40], trace_source=True)
    case(model)
    sizes = tome.source(model).sizes
    assert sizes.max() > 1
    assert (sizes[:, -3:] == 1).all()
    assert (sizes[:, 0] == 1).all()


def test_dinov3_of_torch_hub_passes_lists_of_one_size():
    case = tiny_vit.ALIKE["DINOv3 of torch.hub"]
    model = case.build()
    want = case(patched(model))
    for block in model.blocks:
        forward = type(block).forward
        block.forward = lambda x, rope, f=forward, b=block: [f(b, each, rope) for each in x]
    model.blocks[0].register_forward_pre_hook(lambda m, args: ([args[0]], *args[1:]))
    model.blocks[-1].register_forward_hook(lambda m, args, out: out[0])
    torch.testing.assert_close(case(model), want)
    handle = model.blocks[0].register_forward_pre_hook(lambda m, args: (2 * args[0], *args[1:]))
    with pytest.raises(RuntimeError, match=r"blocks\.0 returns a list"):
        case(model)
    handle.remove()


@pytest.mark.parametrize("share", [0.1, (0.1, -1.0), [0.2, 0.0, 0.1]], ids=str)
def test_r_as_a_share_of_the_patches_that_are_left(share):
    model = patched(r=share, trace_source=True)
    for side in (32, 16):
        model.set_input_size((side, side))
        model(tiny_vit.images(1, side))
        left = (side // 4) ** 2
        for layer, each in enumerate(tome.parse_r(4, share)):
            left -= int(each * left)
            assert tome.source(model, layer).groups == 1 + left


# Rows of one's own


class AcmeLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(24), AcmeAttention()
        self.norm_2, self.feed = nn.LayerNorm(24), nn.Linear(24, 24)

    def forward(self, x):
        x = x + self.attention(self.norm(x), bias=None)
        return x + self.feed(self.norm_2(x))


class AcmeAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(24, 72)

    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class AcmeViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 24, 4, 4), nn.ModuleList(AcmeLayer() for _ in range(3))

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        for layer in self.layers:
            x = layer(x)
        return x


def acme(**options):
    block = tome.Block(
        "norm", tome.Part("attention", tokens="x", bias="bias"), middle="norm_2", end="feed", tokens="x"
    )
    row = tome.VisionFamily(
        "Acme ViT", ("AcmeViT",), {"AcmeLayer": block}, path="layers", prefix=lambda network: 0
    )
    return replace(row, **options)


def changed(**options):
    row = acme()
    return replace(row, blocks={"AcmeLayer": replace(row.blocks["AcmeLayer"], **options)})


def test_a_row_of_ones_own_is_patched_like_those_of_the_package(monkeypatch):
    monkeypatch.setattr(vits, "FAMILIES", list(vits.FAMILIES))
    model = tiny_vit.randomised(AcmeViT())
    plain = model(X)
    with pytest.raises(ValueError, match="AcmeViT holds no vision transformer"):
        tome.apply_patch(model)
    row = acme()
    assert tome.register(row) is row
    patched(model, trace_source=True)
    assert 0 < (model(X) - plain).norm() < plain.norm()
    assert tome.source(model).groups == 64 - 18
    assert torch.equal(tome.remove_patch(model)(X), plain)
    with pytest.raises(ValueError, match="there is a family 'Acme ViT' already"):
        tome.register(acme())


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: "AcmeViT", TypeError, "expected a VisionFamily, got str"),
        (lambda: acme(path=3), TypeError, "VisionFamily: path must be str, got 3"),
        (lambda: acme(prefix=1), TypeError, r"prefix must be Callable\[\[Any\], int\], got 1"),
        (lambda: acme(path=""), ValueError, "needs a name, networks, blocks and a path: path is empty"),
        (lambda: acme(networks="AcmeViT"), TypeError, r"networks must be tuple\[str, ...\], got 'AcmeViT'"),
        (lambda: acme(blocks={"AcmeLayer": 3}), TypeError, r"blocks must be dict\[str, Block\], got"),
        (lambda: acme(prop_attn="yes"), TypeError, "prop_attn must be bool, got 'yes'"),
        (
            lambda: acme(blocks={"AcmeLayer": tome.Block("norm", tome.Part("a"))}),
            ValueError,
            "the row of AcmeLayer in Acme ViT lacks middle, end, attn's bias",
        ),
        (lambda: changed(or_end="feed"), TypeError, r"Block: or_end must be tuple\[str, ...\], got 'feed'"),
        (lambda: changed(input=None), TypeError, "Block: input must be str, got None"),
        (lambda: changed(middle=""), ValueError, 'has "" for some of input, attn, middle and end'),
        (lambda: tome.Part("mix", bias=5), TypeError, r"Part: bias must be str \| None, got 5"),
        (lambda: tome.Part("mix", layers=("out",)), ValueError, "layers must name that of queries first"),
    ],
)
def test_a_row_is_checked_when_it_is_made_or_registered(make, error, reason):
    before = list(vits.FAMILIES)
    with pytest.raises(error, match=reason):
        tome.register(make())
    assert before == vits.FAMILIES


@pytest.mark.parametrize("number", [-1, 1.5, "1", None])
def test_what_never_merges_is_a_number_of_tokens(number, monkeypatch):
    monkeypatch.setattr(vits, "FAMILIES", [acme(prefix=lambda network: number)])
    with pytest.raises(ValueError, match="prefix of Acme ViT must return a number of tokens"):
        tome.apply_patch(AcmeViT())


def test_more_tokens_that_never_merge_than_there_are_is_a_mistake_of_a_row(monkeypatch):
    monkeypatch.setattr(vits, "FAMILIES", [acme(prefix=lambda network: 65)])
    with pytest.raises(RuntimeError, match=r"given 64 tokens, of which by its row 65 never merge: prefix"):
        patched(AcmeViT())(X)


def test_blocks_that_change_places_are_named():
    model = patched(TIMM.build())
    model.blocks = nn.Sequential(*reversed(model.blocks))
    with pytest.raises(RuntimeError, match=r"blocks\.0 had another place before: patch again"):
        model(X)


def test_a_row_that_does_not_fit_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(vits, "FAMILIES", list(vits.FAMILIES))
    block = tome.Block("norm", tome.Part("attention"), middle="norm_3", end="feed")
    row = tome.VisionFamily("Acme", ("AcmeViT",), {"AcmeLayer": block}, path="layers", prop_attn=False)
    tome.register(row)
    with pytest.raises(ValueError, match=r"layers\.0 of AcmeViT has no norm_3"):
        tome.apply_patch(AcmeViT())
