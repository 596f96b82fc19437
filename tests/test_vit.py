"""The laws of merging in vision transformers, on a tiny real model of every family."""

import copy
import io
import pickle

import pytest
import tiny_vit
import torch
import torch.nn.functional as F

import tomesd.vit as tome

CASES = tiny_vit.CASES
SCHEDULE = [7, 0, 9, 40]


@pytest.fixture(params=CASES)
def case(request):
    case = CASES[request.param]
    return case, case.build()


def no_traces(model):
    for module in model.modules():
        assert not [name for name in vars(module) if "tome" in name or name == "r"]
        assert not [hook for name, hooks in vars(module).items() if name.endswith("_hooks") for hook in hooks]
        assert "tomesd" not in type(module).__module__


def call_of(case, model):
    """What the first block is called with, and what comes out of the last, in a forward of the model."""
    seen, blocks = {}, case.blocks(model)
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, a, k: seen.update(args=a, kwargs=k), with_kwargs=True),
        blocks[-1].register_forward_hook(lambda m, a, out: seen.update(out=out)),
    ]
    with torch.no_grad():
        case.run(model)
    for handle in handles:
        handle.remove()
    return seen


def merged_by_loops(case, blocks, x, ropes, schedule, prop_attn):
    """ToMe (Bolya et al., 2023) on the tokens `[N, C]` of one image, as plain as can be: tokens after the blocks."""
    groups = [[i] for i in range(len(x))]  # the original tokens in each token, its survivor first
    for block, rope, r in zip(blocks, ropes, schedule, strict=True):
        keys = []
        sizes = torch.tensor([len(group) for group in groups], dtype=x.dtype)

        def attend(attn, tokens, rope=rope, keys=keys, sizes=sizes, groups=groups):
            q, k, v = case.qkv(attn, tokens)
            keys.append(k.mean(0))
            if rope is not None:
                rows = [group[0] - case.prefix for group in groups[case.prefix :]]
                pick = lambda part: part[..., rows, :]  # noqa: E731
                part = tuple(map(pick, rope)) if isinstance(rope, tuple) else pick(rope)
                q, k = (
                    torch.cat([y[:, : case.prefix], case.rope(y[:, case.prefix :], part)], 1) for y in (q, k)
                )
            weights = (q @ k.mT * q.shape[-1] ** -0.5).exp()
            if prop_attn:
                weights = weights * sizes
            out = weights / weights.sum(-1, keepdim=True) @ v
            out = out.transpose(0, 1).flatten(1)
            return getattr(attn, case.project)(getattr(attn, "norm", torch.nn.Identity())(out))

        x = x + case.first(block, x, attend)
        free = range(case.prefix, len(x))
        src, dst = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
        best = {}
        for i in src:
            cosines = [(F.cosine_similarity(keys[0][i], keys[0][j], dim=0).item(), j) for j in dst]
            best[i] = max(cosines)
        leaving = sorted(src, key=lambda i: -best[i][0])[:r]
        members = {i: [i] for i in range(len(x)) if i not in leaving}
        for i in leaving:
            members[best[i][1]].append(i)
        x = torch.stack([sum(x[j] * sizes[j] for j in ms) / sum(sizes[j] for j in ms) for ms in members.values()])
        groups = [[i for j in ms for i in groups[j]] for ms in members.values()]
        x = x + case.second(block, x)
    out = torch.empty(sum(map(len, groups)), x.shape[-1], dtype=x.dtype)
    for row, group in zip(x, groups, strict=True):
        out[group] = row
    return out


@pytest.mark.parametrize("prop_attn", [True, False])
def test_merging_is_tome_in_plain_loops(case, prop_attn):
    case, model = case
    model = model.double()
    blocks = case.blocks(model)
    plain = call_of(case, model)
    kwargs = plain["kwargs"]
    rope = kwargs.get("rope", kwargs.get("position_embeddings"))
    ropes = [rope] * len(blocks)
    if isinstance(rope, torch.Tensor) and rope.dim() == 3:  # of mixed depth: each block has its own
        ropes = list(model.rope.get_embed(model.patch_embed.grid_size))
    x = plain["args"][0] if plain["args"] else kwargs["hidden_states"]
    with torch.no_grad():
        want = [merged_by_loops(case, blocks, each, ropes, SCHEDULE, prop_attn) for each in x]
    tome.apply_patch(model, prop_attn=prop_attn)
    model.r = SCHEDULE
    torch.testing.assert_close(call_of(case, model)["out"], torch.stack(want), rtol=1e-5, atol=1e-6)


def test_r_0_is_the_unpatched_model_to_the_bit_and_removal_restores_it(case):
    case, model = case
    with torch.no_grad():
        plain = case(model)
        assert tome.apply_patch(model) is model
        assert model.r == 0
        assert torch.equal(case(model), plain)
        model.r = SCHEDULE
        merged = case(model)
        assert merged.shape == plain.shape
        assert 0 < (merged - plain).norm() < plain.norm()
        assert tome.remove_patch(model) is model
        assert torch.equal(case(model), plain)
    no_traces(model)


def test_copies_and_saved_models_merge_alike(case):
    case, model = case
    tome.apply_patch(model)
    model.r = (6, -1.0)
    with torch.no_grad():
        merged = case(model)
        twin = copy.deepcopy(model)
        assert torch.equal(case(twin), merged)
        assert torch.equal(case(pickle.loads(pickle.dumps(model))), merged)
        tome.remove_patch(model)
        assert torch.equal(case(twin), merged)
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_each_image_merges_by_itself(case):
    case, model = case
    tome.apply_patch(model)
    model.r = SCHEDULE
    with torch.no_grad():
        torch.testing.assert_close(case(model, 3)[:2], case(model, 2), rtol=1e-4, atol=1e-5)
