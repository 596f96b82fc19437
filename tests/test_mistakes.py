"""Mistakes that people make with the public names: one clear sentence each, before anything has changed."""

import json
import os
import warnings

import numpy as np
import pytest
import tiny
import torch

import tomesd
from tomesd import DeepShrink, Merge, MergeKeys, MergeStage, Recipe, SampleKeys, TokenMap, TokenMerger
from tomesd import merge as M
from tomesd import vit as tome
from tomesd.methods import files

pytestmark = pytest.mark.usefixtures("no_grad")
METHOD = '{"method": "Merge"}'
X = torch.randn(2, 64, 8)
LINEAR = torch.nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("[" * 10**5, ValueError, "a recipe is a file of JSON, and .*recipe.json is none: maximum recursion"),
        (f'{{"blocks": {{"a": {METHOD}, "a": {METHOD}}}}}', ValueError, "'a' is there twice"),
        (
            f'{{"blocks": {{"a": {METHOD}}}, "about": 5}}',
            TypeError,
            r"about must be a dict of what is known of a recipe, got 5",
        ),
        (
            f'{{"blocks": {{"a": {METHOD}}}, "about": "x"}}',
            TypeError,
            "about must be a dict of what is known of a recipe",
        ),
        (
            '{"blocks": {"a": {"method": "SampleKeys", "moments": 1}}}',
            ValueError,
            "block 'a' of the recipe: Sam",
        ),
        (
            '{"blocks": {"a": {"method": "Merge", "ratio": 1%s}}}' % ("0" * 400),
            ValueError,
            "ratio is too large",
        ),
        ('{"blocks": {"a": {"method": "%s"}}}' % ("x" * 999), ValueError, r"got 'x+\.\.\.x+'$"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_files_that_are_no_recipes(tmp_path, text, error, says):
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(error, match=says):
        Recipe.load(file)


def test_a_recipe_may_begin_with_a_mark_of_its_encoding(tmp_path):
    file = tmp_path / "recipe.json"
    recipe = Recipe({"a": Merge()}, {"speed": 2.0})
    file.write_text("\ufeff" + json.dumps(recipe.to_dict()), encoding="utf-8")
    assert Recipe.load(file) == recipe
    file.write_text("as it was")
    with pytest.raises(TypeError, match=r"about must be plain JSON to be kept in a file: .*float32"):
        Recipe(recipe, {"speed": np.float32(2)}).save(file)
    assert file.read_text() == "as it was"


def test_files_are_written_whole_or_not_at_all_and_devices_stay(tmp_path):
    file, link, pipe = tmp_path / "recipe.json", tmp_path / "link.json", tmp_path / "pipe"
    file.write_text("as it was")
    with pytest.raises(UnicodeEncodeError), files.whole(file) as part:
        part.write_text("ü", encoding="ascii")
    assert file.read_text() == "as it was"
    link.symlink_to(file)
    recipe = Recipe({"a": Merge()})
    recipe.save(link)
    assert link.is_symlink()
    assert Recipe.load(file) == recipe
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    recipe.save(pipe)  # as /dev/stdout or /dev/null
    assert json.loads(os.read(reader, 9999)) == recipe.to_dict()
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe", "recipe.json"]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Merge(-0.1), ValueError, r"ratio must be in \[0, 1\], .* got -0.1"),
        (lambda: Merge(1.1), ValueError, "got 1.1"),
        (lambda: Merge(float("nan")), ValueError, "got nan"),
        (lambda: SampleKeys(1), ValueError, r"ratio must be in \[0, 1\), .* got 1"),
        (lambda: Merge("0.5"), TypeError, r"ratio must be a number, got '0.5' \(str\)"),
        (lambda: Merge([0.0] * 1000), TypeError, r"got \[0.0, .*\.\.\.\] \(list\)"),
        (lambda: Merge(True), TypeError, "ratio must be a number, got True"),
        (lambda: Merge(parts="attn"), TypeError, r"parts must be a tuple of names, got 'attn' \(str\)"),
        (lambda: Merge(parts=()), ValueError, "parts is empty, it may hold attn, cross, mlp"),
        (lambda: Merge(parts=("attn1",)), ValueError, "each of parts must be one of .*, got 'attn1'"),
        (lambda: Merge(sx=0), ValueError, "sx must be at least 1, got 0"),
        (lambda: MergeStage(sy=2.0), TypeError, r"sy must be an integer, got 2.0 \(float\)"),
        (lambda: Merge(seed="a"), TypeError, "seed must be an integer or None, got 'a'"),
        (lambda: Merge(matching="fast"), ValueError, "matching must be one of windowed, exact, got 'fast'"),
        (lambda: Merge(unmerge="magic"), ValueError, "unmerge must be one of linear, copy, got 'magic'"),
        (lambda: MergeStage(prop_attn=1), TypeError, r"prop_attn must be a bool or None, got 1"),
        (lambda: Merge(parts=("mlp",), prop_attn=True), ValueError, "prop_attn=True weighs keys of self-att"),
        (lambda: MergeStage(parts=("attn",)), TypeError, "unexpected keyword argument 'parts'"),
        (lambda: SampleKeys(matching="exact"), TypeError, "unexpected keyword argument 'matching'"),
        (
            tomesd.Method,
            TypeError,
            "Method is what all methods have in common: take Merge, MergeKeys, SampleKeys",
        ),
        (lambda: Recipe([]), TypeError, "methods must be a dict of block names, got list"),
        (lambda: Recipe({}), ValueError, "a recipe needs a method for one block at least"),
        (lambda: Recipe({"a": 0.5}), TypeError, r"maps names of blocks to methods, got \{'a': 0.5\}"),
        (lambda: Recipe.from_dict({"a": {}}), TypeError, "a recipe is described by"),
        (lambda: Recipe.from_dict({"blocks": {}, "model": "x"}), TypeError, "a recipe is described by"),
        (lambda: type("Merge", (tomesd.Method,), {}), TypeError, "there is a method Merge already"),
        (lambda: Merge(10**400), ValueError, r"ratio is too large a number: 1000.*\.\.\..*000"),
        (
            lambda: Merge(sx=-(10**5000)),
            ValueError,
            "sx must be at least 1, got one that is too long to show",
        ),
        (lambda: Merge(np.eye(9)), TypeError, r"ratio must be a number, got [^\n]*$"),
        (lambda: DeepShrink(2, downsample=2.0), TypeError, r"downsample must be an integer, got 2.0"),
        (
            lambda: Recipe({"a": Merge()}, [1]),
            TypeError,
            r"about must be a dict of what is known of a recipe, got \[1\]",
        ),
        (
            lambda: Recipe({"a": Merge()}, {1: 2}),
            TypeError,
            "about must be a dict of what is known of a recipe",
        ),
        (lambda: M.bipartite_soft_matching(X, 2.0), TypeError, r"r must be an integer, got 2.0 \(float\)"),
        (lambda: M.bipartite_soft_matching_random2d(X, 8, 8, "2", 2, 4), TypeError, "sx must be an integer"),
        (lambda: M.random_bipartite_soft_matching(X, 4, 0), TypeError, "generator must be .* or None, got 0"),
        (lambda: M.kth_bipartite_soft_matching(X, 1.5), TypeError, r"k must be an integer, got 1.5"),
        (
            lambda: M.bipartite_soft_matching(X, 2)[0](X.numpy()),
            TypeError,
            "merge needs a tensor, got ndarray",
        ),
        (lambda: TokenMap.from_index([[0, 0]], 1), TypeError, "index must be a tensor, got list"),
        (lambda: TokenMap.from_index(torch.zeros(1, 2).long(), "1"), TypeError, "groups must be an integer"),
        (lambda: TokenMerger(X, 8, mask_id=2**64), ValueError, "mask_id must fit into int64"),
        (
            lambda: M.merge_wavg(M.bipartite_soft_matching(X, 2), X),
            TypeError,
            "the two callables .* got tuple",
        ),
        (lambda: M.merge_source(X, M.do_nothing), TypeError, "the two callables .* got Tensor"),
        (
            lambda: M.merge_wavg(M.do_nothing, X, X[..., 0]),
            ValueError,
            r"size must be \[2, 64, 1\] .*\[2, 64\]",
        ),
        (
            lambda: M.compute_merge(X, {}),
            TypeError,
            r'tome_info must be \{"size": .*got \{\}',
        ),
        (
            lambda: M.compute_merge(X, {"size": (8, 8), "args": {"ratio": "1"}}),
            TypeError,
            "ratio must be a number, got '1'",
        ),
        (lambda: TokenMap.identity(-1), ValueError, "n must be at least 0, got -1"),
        (
            lambda: TokenMerger(X, 8).chain(X, 8),
            ValueError,
            r"keys must be of the \[2, 56\] tokens that are left",
        ),
        (lambda: Recipe({"a": Merge()}).save("no/r.json"), FileNotFoundError, "no such folder: '.*/no'"),
        (lambda: TokenMap.identity("4"), TypeError, "n must be an integer, got '4'"),
        (lambda: TokenMap.identity(4).compose(None), TypeError, "then must be a TokenMap, got NoneType"),
        (lambda: TokenMap.identity(64).merge(X, size=[1]), TypeError, "size must be a tensor, got list"),
        (lambda: Recipe.load(None), TypeError, "path must be that of a file, .* got None"),
        (lambda: Recipe({"a": Merge()}).save(5), TypeError, "path must be that of a file, .* got 5"),
        (lambda: tome.Schedule([1]).save(None), TypeError, "path must be that of a file, .* got None"),
        (lambda: tome.parse_r("4", 8), TypeError, "layers must be an integer, got '4'"),
        (
            lambda: tome.parse_r(4, (-float("inf"), -1)),
            TypeError,
            r"r must be an integer, .* got \(-inf, -1\)",
        ),
        (lambda: tome.utils.benchmark(None), TypeError, "expected a torch module, got NoneType"),
        (lambda: tome.utils.benchmark(LINEAR, "gpu"), TypeError, "device must be a name .* got 'gpu'"),
        (lambda: tome.utils.benchmark(LINEAR, None), TypeError, "device must be a name .* got None"),
        (lambda: tome.utils.benchmark(LINEAR, "meta"), ValueError, "meta cannot run anything here"),
        (
            lambda: tome.utils.benchmark(LINEAR, "cpu", (3, 0)),
            ValueError,
            r"each of input_size \(3, 0\) must",
        ),
        (lambda: tome.utils.benchmark(LINEAR, "cpu", verbose=2), TypeError, "verbose must be a bool, got 2"),
        (lambda: tome.utils.benchmark(LINEAR, "cpu", use_fp16=1), TypeError, "use_fp16 must be a bool"),
        (lambda: tome.keep(X.long(), 0.5), TypeError, "embeddings must be .* got torch.int64"),
        (lambda: tome.utils.benchmark(LINEAR, "cpu", 224), TypeError, "input_size must be .* got 224"),
        (lambda: tome.utils.benchmark(LINEAR, "cpu", (1,), "1"), TypeError, "batch_size must be an integer"),
        (lambda: tome.utils.benchmark(LINEAR, "cpu", (1,), 1, 2.0), TypeError, "runs must be an integer"),
    ],
)
def test_values_are_checked(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_options_become_plain_python():
    assert tome.reduce(X, np.int64(16)).tokens.shape == (2, 16, 8)
    shrink = DeepShrink(np.float32(2), downsample=np.int64(4))
    assert repr(shrink) == "DeepShrink(factor=2.0, until=0.35, downsample=4)"
    assert repr(TokenMerger(X, 8).chain(X[:, :56])) == (
        "TokenMerger(56 -> 48 tokens, 64 before the first layer)"
    )


class Odd:
    """What may be in an app beside its pipeline."""

    @property
    def components(self):
        raise RuntimeError("not now")


@pytest.mark.parametrize("key", [torch.tensor(1), np.bool_(True), 1.0, "1"], ids=repr)
def test_keys_are_levels_or_names(key):
    unet = tiny.small_unet()
    with pytest.raises(ValueError, match=r"by downsample \(1, 2, 4, 8\) or by the name of a block, got .*\("):
        tomesd.apply_patch(unet, {key: 0.5})
    assert not any(row.method for row in tomesd.explain(unet).rows)
    assert any(row.method for row in tomesd.explain(tomesd.apply_patch(unet, {np.int64(1): 0.5})).rows)


def test_models_are_looked_for_without_running_code_of_others():
    odd = Odd()
    odd.odd, odd.pipe = Odd(), tiny.sd(unet=tiny.small_unet())
    assert tomesd.apply_patch(odd) is odd
    with pytest.raises(ValueError, match="module holds no network that tomesd knows"):
        tomesd.apply_patch(torch)
    with pytest.raises(TypeError, match=r"patched\(\) got an unexpected keyword argument 'ration'"):
        tomesd.patched(odd, ration=0.5).__enter__()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(methods=Merge()), TypeError, r"methods must be several methods, such as .*, got Merge\(0.5\)"),
        (dict(methods=[]), ValueError, "methods is empty"),
        (dict(prompts=[]), ValueError, "prompts is empty"),
        (dict(prompts=3), TypeError, "prompts must be a text, several or a function that draws, got 3"),
        (dict(prompts=[3]), TypeError, "each of prompts must be a text, got 3"),
        (dict(height=0), ValueError, "height must be at least 1, got 0"),
        (dict(steps="20"), TypeError, "steps must be an integer, got '20'"),
        (dict(progress=1), TypeError, "progress must be a bool, got 1"),
        (dict(pipe={"pipe": "x"}), TypeError, "dict draws nothing by itself: give its pipeline"),
    ],
    ids=str,
)
def test_options_of_tune(options, error, says):
    pipe = tiny.sd(unet=tiny.small_unet())
    held = {"pipe": {"pipe": pipe}} if "pipe" in options else {"pipe": pipe}
    with pytest.raises(error, match=says):
        tomesd.tune(**{**options, **held})


@pytest.mark.parametrize("method", [Merge(), MergeKeys()], ids=str)
def test_warnings_of_calls_are_of_the_users_line(method):
    """However many frames of torch and diffusers lie between."""
    pipe = tiny.sd(unet=tiny.small_unet())
    tomesd.apply_patch(pipe, method)
    attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.forward = lambda *args, forward=attn.forward, **kwargs: forward(*args, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        tiny.generate(pipe)
    assert {w.filename for w in caught if str(w.message).startswith("tomesd: ")} == {tiny.__file__}


def test_explain_takes_integers_of_numpy():
    found = tomesd.explain(tiny.small_unet(), np.int64(128))
    assert (type(found.height), type(found.rows[0].before)) == (int, int)
    with pytest.raises(TypeError, match="width must be an integer, got True"):
        tomesd.explain(tiny.small_unet(), width=True)
