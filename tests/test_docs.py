"""The code of README and docs as it stands there, on tiny models; and their links."""

import contextlib
import io
import re
import runpy
from functools import cache
from pathlib import Path

import diffusers as D
import pytest
import timm
import tiny
import torch

import tomesd
import tomesd.vit as tome
from tomesd.__main__ import COMMANDS
from tomesd.commands.common import need

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CODE = [page for page in PAGES if page.name != "CONTRIBUTING.md"]  # that one has a test of its own


def names():
    """What the pages of the API take as given."""
    torch.manual_seed(0)
    metric = torch.randn(2, 64 * 64, 8)
    return {
        "tomesd": tomesd,
        "keys": torch.randn(2, 4096, 8),
        "block_keys": lambda y: y,
        "block": lambda y: y,
        "attention": lambda y: y,
        "index": torch.arange(4096)[None] // 41,
        "another": tomesd.TokenMap.identity(100),
        "sizes": torch.ones(2, 4096),
        "metric": metric,
        "x": metric,
        "images": torch.randn(1, 3, 224, 224),
        "torch": torch,
    }


@pytest.fixture
def tiny_world(monkeypatch, tmp_path):
    pipe = tiny.sd(unet=tiny.unet())
    call = type(pipe).__call__

    def small(self, *args, height=None, width=None, **kwargs):
        kwargs["num_inference_steps"] = min(kwargs.get("num_inference_steps", 2), 2)
        return call(self, *args, height=128, width=128, **kwargs)

    monkeypatch.setattr(D.StableDiffusionPipeline, "__call__", small)
    monkeypatch.setattr(D.StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, **_: timm.models.VisionTransformer(depth=4, embed_dim=24, num_heads=3),
    )
    monkeypatch.setattr(
        tomesd,
        "tune",
        lambda pipe, *_, **__: tomesd.Recipe({tomesd.explain(pipe).rows[0].name: tomesd.Merge(0.5)}),
    )
    monkeypatch.setattr(tome, "tune", lambda *_, **__: tome.Schedule([40, 0, 8]))
    monkeypatch.chdir(tmp_path)
    yield pipe
    torch.compiler.reset()


def run(page, pipe):
    """What the code of a page leaves."""
    space = {**names(), "pipe": pipe}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), space)
    return space


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tiny_world):
    left = run(page, tiny_world)
    if page.name == "recipes.md":
        the_modular_block_merges(left["blocks"])


def the_modular_block_merges(blocks):
    pipe, parts = blocks.init_pipeline(), tiny.sdxl().components
    pipe.update_components(**{name: parts[name] for name in set(parts) & set(pipe.components) if parts[name]})
    pipe.set_progress_bar_config(disable=True)

    def draw(merge):
        call = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 1, "output": "latents"}
        return pipe(prompt="a cat", height=64, width=64, merge=merge, **call)

    plain, merged = draw(0.0), draw(tomesd.SampleKeys(0.5))
    assert not torch.equal(merged, plain)
    assert torch.equal(draw(0.0), plain)


def anchors(page):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@cache
def help_of(command, name):
    """What a command says of itself; None of an unknown one."""
    bench = "scripts/bench" in command
    known = runpy.run_path(str(ROOT / "scripts/bench/__main__.py"))["COMMANDS"] if bench else COMMANDS
    out = io.StringIO()
    if name in known:
        module = need(("" if bench else "tomesd.commands.") + name.replace("-", "_"))
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            module.main(["--help"])
    return out.getvalue() if name in known else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_are_there(page):
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    code = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    code += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in code:
        call = re.match(
            r"(?:.*-m )?(tomesd|python scripts/bench)\s+([a-z][\w-]*)\s*([^#;]*)", line, re.DOTALL
        )
        if call is None or call[2].startswith("import"):
            continue
        says = help_of(call[1], call[2])
        assert says is not None, line
        for option in re.findall(r"--[a-z][\w-]*", call[3]):
            assert re.search(rf"{option}\b", says), f"{line}: there is no {option}"
