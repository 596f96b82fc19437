"""Merging in vision transformers is ToMe, layer by layer."""

from functools import partial

import pytest
import tiny_vit
import torch
import torch.nn.functional as F

import tomesd.vit as tome
from tomesd.methods import layers

CASES = {**tiny_vit.CASES, **tiny_vit.ALIKE}
SCHEDULE = [7, 0, 9, 40]


def call_of(case, model):
    """What the first block is called with, its last linear layer too, and what comes out of the last."""
    seen, blocks = {}, case.blocks(model)
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, a, k: seen.update(args=a, kwargs=k), with_kwargs=True),
        blocks[-1].register_forward_hook(
            lambda m, a, out: seen.update(out=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    for layer in blocks[0].modules():
        if isinstance(layer, torch.nn.Linear):
            handles.append(layer.register_forward_pre_hook(lambda m, a: seen.update(linear=a[0])))
    with torch.no_grad():
        case.run(model)
    for handle in handles:
        handle.remove()
    return seen


def merge_by_loops(case, x, by, groups, sizes, r, mode):
    """The tokens after one step of merging, and the original tokens in each."""
    free = range(case.prefix, len(x) - case.suffix)
    src, dst = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
    best = {}
    for i in src:
        cosines = [(F.cosine_similarity(by[i], by[j], dim=0).item(), j) for j in dst]
        best[i] = max(cosines)
    leaving = sorted(src, key=lambda i: -best[i][0])[:r]
    members = {i: [i] for i in range(len(x)) if i not in leaving}
    for i in leaving:
        members[best[i][1]].append(i)
    means = [sum(x[j] * sizes[j] for j in ms) / sum(sizes[j] for j in ms) for ms in members.values()]
    if mode == "mlerp":
        longest = [max(x[j].norm() for j in ms) for ms in members.values()]
        means = [mean / mean.norm() * norm for mean, norm in zip(means, longest, strict=True)]
    return torch.stack(means), [[i for j in ms for i in groups[j]] for ms in members.values()]


def merged_by_loops(case, blocks, x, ropes, schedule, prop_attn, metric, mode):
    """ToMe (Bolya et al., 2023) on the tokens `[N, C]` of one image, as plain as can be."""
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
            return getattr(attn, case.project, torch.nn.Identity())(
                getattr(attn, "norm", torch.nn.Identity())(out)
            )

        if not case.at_once:
            x = x + case.first(block, x, attend)
        by = keys[0] if metric == "keys" else x[:, :16]
        x, groups = merge_by_loops(case, x, by, groups, sizes, r, mode)
        if case.at_once:
            sizes = torch.tensor([len(group) for group in groups], dtype=x.dtype)
            x = x + case.first(block, x, partial(attend, sizes=sizes, groups=groups))
        x = x + case.second(block, x)
    out = torch.empty(sum(map(len, groups)), x.shape[-1], dtype=x.dtype)
    for row, group in zip(x, groups, strict=True):
        out[group] = row
    return out


OPTIONS = [(True, "keys", "mean"), (False, "keys", "mean"), (True, "tokens", "mlerp")]


@pytest.mark.parametrize(
    ("name", "prop_attn", "metric", "mode"),
    [(name, *options) for name in CASES for options in OPTIONS[: 1 if name in tiny_vit.ALIKE else None]],
)
def test_merging_is_tome_in_plain_loops(name, prop_attn, metric, mode, monkeypatch):
    monkeypatch.setattr(layers, "CHANNELS", 16)
    case, model = CASES[name], CASES[name].build()
    if (prop_attn and not case.sizes) or (metric == "keys" and not case.keys):
        with pytest.raises(ValueError, match=r"takes no sizes of tokens|cannot be seen"):
            tome.apply_patch(model, prop_attn=prop_attn, metric=metric)
        prop_attn, metric = prop_attn and case.sizes, "tokens"
    model = model.double()
    blocks = case.blocks(model)
    plain = call_of(case, model)
    kwargs = plain["kwargs"]
    rope = kwargs.get("rope", kwargs.get("position_embeddings"))
    ropes = [rope] * len(blocks)
    if isinstance(rope, torch.Tensor) and rope.dim() == 3:  # of mixed depth: each block has its own
        ropes = list(model.rope.get_embed(model.patch_embed.grid_size))
    x = plain["args"][0] if plain["args"] else kwargs["hidden_states"]
    if len(plain["args"]) == 2:  # DINOv3 of torch.hub
        ropes = [plain["args"][1]] * len(blocks)
    first = x.shape[0] != 2  # OpenAI's CLIP has its tokens first
    x = x.transpose(0, 1) if first else x
    with torch.no_grad():
        options = (prop_attn, metric, mode)
        want = [merged_by_loops(case, blocks, each, ropes, SCHEDULE, *options) for each in x]
    tome.apply_patch(model, prop_attn=prop_attn, metric=metric, mode=mode)
    model.r = SCHEDULE
    call = call_of(case, model)
    got, before, after = call["out"], *(seen["linear"].shape[0 if first else 1] for seen in (plain, call))
    assert after == before - SCHEDULE[0]  # the second half does no work for what has merged
    torch.testing.assert_close(got.transpose(0, 1) if first else got, torch.stack(want), rtol=1e-5, atol=1e-6)
