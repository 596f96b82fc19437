"""Fewer tokens for language models: the ways of examples/vlm.py, on tiny models of three kinds."""

from types import SimpleNamespace

import pytest
import tiny_vit
import torch
import transformers as T
import vlm
from PIL import Image

import tomesd.vit as tome

pytestmark = pytest.mark.usefixtures("no_grad")
TEXT = dict(
    vocab_size=1300,
    hidden_size=48,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
)
CALL = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)


def paligemma():
    _, other = vlm.tiny()
    images = T.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 64
    processor = T.PaliGemmaProcessor(images, other.tokenizer)
    config = T.PaliGemmaConfig(
        vision_config=T.SiglipVisionConfig(**tiny_vit.CONFIG, projection_dim=48, vision_use_head=False),
        text_config=T.GemmaConfig(**TEXT, head_dim=16),
        projection_dim=48,
        image_token_index=processor.image_token_id,
    )
    return tiny_vit.randomised(T.PaliGemmaForConditionalGeneration(config)), processor


def with_class_token():
    return vlm.tiny("full")


@pytest.mark.parametrize(("build", "more"), [(vlm.tiny, 0), (with_class_token, 1), (paligemma, 0)])
def test_a_processor_writes_as_many_places_as_are_read(build, more):
    model, processor = build()
    projected = []
    model.model.multi_modal_projector.register_forward_hook(lambda m, a, out: projected.append(out.shape[1]))
    for keep in (64, 16):
        vlm.shorten_prompts(model, processor, keep)
        inputs = processor(images=Image.new("RGB", (40, 50), "red"), text="<image> what", return_tensors="pt")
        image = getattr(model.config, "image_token_id", model.config.image_token_index)
        assert (inputs["input_ids"] == image).sum() == keep + more
        assert model.generate(**inputs, **CALL).shape[1] == inputs["input_ids"].shape[1] + 5
        assert projected.pop() == keep + more


@pytest.fixture(scope="module")
def qwen():
    config = T.Qwen2_5_VLConfig(
        vision_config=dict(
            depth=2,
            hidden_size=24,
            intermediate_size=48,
            num_heads=3,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=[1],
            out_hidden_size=48,
        ),
        text_config=dict(
            TEXT, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)
        ),
        image_token_id=9,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tiny_vit.randomised(T.Qwen2_5_VLForConditionalGeneration(config))


def prompts(*sizes):
    """What a processor makes of a prompt for each picture of a size, in patches."""
    rows = [[5, 6] + [9] * (h * w // 4) + [7, 8, 9 + w] for h, w in sizes]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == 9).int(),
        "image_grid_thw": torch.tensor([[1, h, w] for h, w in sizes]),
        "pixel_values": torch.randn(sum(h * w for h, w in sizes), 3 * 2 * 4 * 4),
    }


def test_all_tokens_of_qwen_are_the_same_prompt(qwen):
    inputs = prompts((8, 12))
    plain = qwen.generate(**inputs, **CALL)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(qwen.generate(**vlm.shortened(qwen, inputs, 24), **CALL), plain)


def test_tokens_of_qwen_that_stay_keep_their_positions(qwen, monkeypatch):
    """A shortened prompt is the whole one under a mask of what has gone."""
    kept = []

    def sample(*args, **kwargs):
        kept.append(tome.reduce(*args, **kwargs, how="sample"))
        return kept[-1]

    monkeypatch.setattr(vlm, "tome", SimpleNamespace(reduce=sample))
    inputs = prompts((8, 12), (4, 8))
    short = vlm.shortened(qwen, inputs, 0.5)
    assert short["attention_mask"].sum(1).tolist() == [5 + 12, 5 + 4]
    assert short["attention_mask"].shape[1] == 5 + 12
    positions, _ = qwen.model.get_rope_index(**inputs)
    places = inputs["input_ids"] == 9
    inputs["attention_mask"][places] = torch.cat(
        [
            torch.zeros(n, dtype=torch.long).index_fill(0, r.map.keep[0], 1)
            for n, r in zip((24, 8), kept, strict=True)
        ]
    )
    whole = qwen(**inputs, position_ids=positions).logits[:, -3:]
    torch.testing.assert_close(qwen(**short).logits[:, -3:], whole, rtol=1e-4, atol=1e-4)
    other = qwen(**{**short, "position_ids": None}).logits[:, -3:]
    assert (other - whole).abs().max() > 0.01


def test_the_example_says_how_long_the_prompt_is(capsys):
    vlm.main(["--keep", "0.5"])
    assert capsys.readouterr().out.startswith("tokens of the prompt: 68, shortened 36\n")
