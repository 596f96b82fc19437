"""tune for vision transformers: what schedules cost, the search, and schedules in files."""

import copy
import itertools
import pickle
import random

import pytest
import tiny_vit
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tomesd.vit as tome
from tomesd.hosts.hooks import patch_of
from tomesd.hosts.networks import find_networks
from tomesd.methods.cost import Work
from tomesd.vit import tuning

CASE = tiny_vit.CASES["timm ViT"]
R = [20, 0, 3, 9]


def operations_of(model, run):
    (network,) = find_networks(model)
    return tuning.Operations.of(network, patch_of(network.module), run)


@pytest.mark.parametrize(
    "name", ["timm DINOv2 with registers", "timm parallel", "torchvision", "transformers YOLOS"]
)
def test_operations_and_tokens_are_those_that_run(name):
    case = tiny_vit.CASES[name]
    model = tome.apply_patch(case.build(), trace_source=True)
    operations = operations_of(model, lambda: case.run(model, 1))
    counts = []
    for r in ([0], R):
        model.r = r
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            case.run(model, 1)
        counts.append(counter.get_total_flops())
    left = operations.left(R)
    assert left == [tome.source(model, layer).groups for layer in range(4)]
    free = [n - operations.fixed for n in (operations.tokens, *left)]
    matching = sum(2 * 24 * (n // 2) * (n - n // 2) for n, r in zip(free, R, strict=False) if r)
    plain = sum(work.flops(operations.tokens, operations.tokens) for work in operations.works)
    assert plain * (1 - operations.share(R)) == pytest.approx(counts[0] - counts[1] + matching)


class MadeUp(tuning.Judge):
    """Errors of three layers of which the second one loses little, but only after the first has merged."""

    def __init__(self, batches):
        self.batches, self.known, self.chance, self.ran = range(batches), {}, random.Random(0), 0

    def errors(self, r, batch):
        if (tuple(r), batch) not in self.known:
            self.ran += 1
            a, b, c = r
            error = 3 * a**2 + max(0, b - a) ** 2 + 0.2 * b**2 + c**2
            self.known[tuple(r), batch] = torch.tensor([error + 0.1 * batch])
        return self.known[tuple(r), batch]


@pytest.mark.parametrize("limit", [0.5, 0.7])
@pytest.mark.parametrize("batches", [1, 11])
def test_the_search_finds_the_best_of_all(limit, batches):
    work = Work((("all", 8, 8), ("left", 8, 32)), (("all", "all", 1, 8),))
    operations = tuning.Operations((work,) * 3, 25, 1)
    none, few, judge = (MadeUp(batches) for _ in range(3))
    tuning.search(none, operations, limit, ())
    tuning.search(few, operations, limit, range(3))
    assert 3 * batches <= few.ran - none.ran < 4 * batches
    every = {tuple(operations.merged(r)) for r in itertools.product(range(13), repeat=3)}
    best, start = tuning.search(judge, operations, limit, range(150))
    assert operations.share(best) <= limit
    assert judge(best) < judge(start)
    assert judge(best) == min(MadeUp(batches)(r) for r in every if operations.share(r) <= limit)


def test_what_is_worse_on_a_few_pictures_is_not_judged_on_all():
    judge = MadeUp(11)
    assert judge.nearer([1, 1, 1], [0, 0, 1]) == [0, 0, 1]
    assert judge.ran == 22
    assert judge.nearer([0, 0, 1], [5, 5, 5]) == [0, 0, 1]
    assert judge.ran == 23


def test_vectors_are_judged_by_whom_pictures_resemble():
    """Against the definition in plain loops; a feature that all pictures share says nothing."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(70, 5, generator=generator).double()
    plain[:, 4] = 3
    merged = plain + 0.3 * torch.randn(70, 5, generator=generator).double()
    patches = torch.randn(70, 4, 3, generator=generator).double()
    outputs = [plain, patches]

    class Model(torch.nn.Module):
        def forward(self, x):
            vectors = outputs[0][x]
            return {"some": vectors[:, :2], "patches": outputs[1][x], "others": vectors[:, 2:]}

    network = torch.nn.Module()
    x = torch.arange(70)
    judge = tuning.Judge(Model(), network, [x[:30], x[30:]])
    outputs[:] = [merged, patches * 1.25]

    def unit(v):
        v = (v - plain.mean(0))[:4] / plain.std(0)[:4] if v.dim() == 1 else v
        return v / v.norm()

    def shares(v, own):
        cosines = [torch.dot(unit(v), unit(plain[j])).div(0.1).exp() for j in range(70) if j != own]
        return torch.stack(cosines) / sum(cosines)

    wanted = []
    for i in range(70):
        p, q = shares(plain[i], i), shares(merged[i], i)
        wanted.append((p * (p / q).log()).sum())
    found = torch.cat([judge.errors([1], batch).view(2, -1) for batch in range(len(judge.batches))], dim=1)
    torch.testing.assert_close(found[0], torch.full((70,), 0.25))
    torch.testing.assert_close(found[1], torch.stack(wanted).float(), rtol=1e-3, atol=1e-5)


def test_a_few_pictures_are_judged_by_relative_errors():
    judge = tuning.Judge(torch.nn.Flatten(), torch.nn.Module(), torch.rand(63, 1, 3))
    assert judge.company is None
    assert tuning.Judge(torch.nn.Flatten(), torch.nn.Module(), torch.rand(64, 1, 3)).company is not None


@pytest.mark.parametrize("patched", [False, True])
def test_what_is_found_is_nearer_than_what_is_made_by_hand(patched, monkeypatch):
    monkeypatch.setattr(tuning, "BATCH", 2)
    model, x = CASE.build(), tiny_vit.images(6)
    if patched:
        tome.apply_patch(model, mode="mean")
        model.r = 3
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before = model(x)
    schedule = tome.tune(model, [x[:4], x[4:]], 0.6, trials=20, progress=False)
    assert torch.equal(model(x), before)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert schedule.about["error"] < schedule.about["error_by_hand"]
    assert schedule.about["flops"] <= 0.6
    if not patched:
        tome.apply_patch(model)
    model.r = 0
    plain = model(x)
    model.r = schedule
    error = ((model(x) - plain).norm(dim=1) / plain.norm(dim=1)).mean()
    assert error.item() == pytest.approx(schedule.about["error"], rel=1e-3)


@pytest.mark.parametrize("batches", [1, 2])
def test_functions_may_say_what_is_to_stay_near(batches):
    model = tiny_vit.CASES["transformers CLIP"].build()
    asked = []

    def run():
        asked.append(model.vision_model(tiny_vit.images(2)))
        return asked[-1].last_hidden_state[:, 1:]

    tome.apply_patch(model)
    schedule = tome.tune(model.vision_model, run if batches == 1 else [run] * 2, trials=0, progress=False)
    model.r = 5
    assert patch_of(find_networks(model)[0].module).r == 5  # that of the model that was patched
    assert schedule.about["error"] == schedule.about["error_by_hand"]
    # Plain, the sizes of the tokens, and what is made by hand.
    assert 2 * batches < len(asked) <= 8 * batches + 1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"flops": 1}, ValueError, "flops must be above 0 and below 1, the share that is left, got 1"),
        ({"flops": "half"}, TypeError, "flops must be a number, got 'half'"),
        ({"flops": 0.1}, ValueError, r"no schedule leaves 0\.1 of the operations: 0\.\d+ is the least"),
        ({"trials": -1}, ValueError, "trials must be at least 0, got -1"),
        ({"images": lambda: None}, TypeError, "no floating point tensor with a row for each picture"),
        (
            {"images": "cats"},
            TypeError,
            "images must be a tensor, a function or a list of them, got 'cats'",
        ),
        ({"images": lambda: torch.zeros(2, 3)}, ValueError, "VisionTransformer did not run"),
        ({"model": CASE.build().train()}, ValueError, r"call model\.eval\(\) first"),
        ({"model": torch.nn.ModuleList([CASE.build(), CASE.build()])}, ValueError, "pass one of them: 0, 1"),
        ({"model": torch.nn.Linear(3, 3)}, ValueError, "Linear holds no vision transformer"),
        ({"images": tiny_vit.images(1) * torch.nan}, ValueError, "what the model returns is not finite"),
        ({"images": [tiny_vit.images(1)[:0]]}, ValueError, "there are no pictures"),
    ],
)
def test_mistakes_are_named_and_leave_no_patch(change, error, says):
    given = {"model": CASE.build(), "images": tiny_vit.images(1), "progress": False, **change}
    with pytest.raises(error, match=says):
        tome.tune(**given)
    assert not any(module._forward_hooks for module in given["model"].modules())


def test_schedules_are_lists_that_are_kept_in_files(tmp_path):
    schedule = tome.Schedule([20, 4, 0, 1], {"flops": 0.5, "error_by_hand": 0.25, "left": [45, 41, 41, 40]})
    schedule.save(tmp_path / "schedule.json")
    for again in (tome.Schedule.load(tmp_path / "schedule.json"), copy.deepcopy(schedule)):
        assert again == schedule == [20, 4, 0, 1]
        assert again.about == schedule.about
    assert pickle.loads(pickle.dumps(schedule)).about == schedule.about
    assert str(schedule).splitlines() == [
        "layer      r   left",
        "    1     20     45",
        "    2      4     41",
        "    3      0     41",
        "    4      1     40",
        "flops 0.5, error by hand 0.25",
    ]
    assert str(tome.Schedule([0.5])).splitlines() == ["layer      r   left", "    1    0.5"]
    with pytest.raises(TypeError, match="r must be an integer"):
        tome.Schedule([1, "2"])
    (tmp_path / "other.json").write_text("[8, 4]")
    with pytest.raises(TypeError, match=r"a schedule is described by .*, got \[8, 4\]"):
        tome.Schedule.load(tmp_path / "other.json")


@pytest.mark.parametrize("r", [None, 5, "84", {1: 2}])
def test_a_schedule_is_a_list(r):
    with pytest.raises(TypeError, match="r must be a list"):
        tome.Schedule(r)


@pytest.mark.parametrize("about", [5, [1], {1: 2}, {"a": object()}])
def test_what_is_known_of_a_schedule_is_plain_json(about):
    with pytest.raises(TypeError, match="about must be a dict"):
        tome.Schedule([1, 2], about)


@pytest.mark.parametrize("left", [5, [1], [None, 1]])
def test_a_schedule_prints_whatever_a_file_says_of_it(left):
    assert "2" in str(tome.Schedule([1, 2], {"left": left}))


@pytest.mark.parametrize("text", ["", '{"r":' + 100_000 * "[", "\xff"])
def test_a_file_that_is_no_json_is_named(text, tmp_path):
    (tmp_path / "schedule.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a schedule is a file of JSON, and .*schedule\.json is none"):
        tome.Schedule.load(tmp_path / "schedule.json")


def test_tune_leaves_what_the_last_forward_has_merged_to_be_seen():
    model = tome.apply_patch(CASE.build(), trace_source=True)
    model.r = 3
    model(tiny_vit.images(2))
    seen = tome.source(model)
    tome.tune(model, tiny_vit.images(1), trials=0, progress=False)
    assert tome.source(model) is seen
    model(tiny_vit.images(2))
    assert tome.source(model) is not seen
