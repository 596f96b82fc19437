"""Vision-language models that read fewer tokens of a picture, with as many places in the prompt.

    python examples/vlm.py                      a tiny LLaVA of random weights, offline
    python examples/vlm.py --model llava-hf/llava-1.5-7b-hf --keep 144 --image my.jpg
    python examples/vlm.py --model Qwen/Qwen2.5-VL-3B-Instruct --keep 0.25 --image my.jpg

`shorten_prompts` is for LLaVA and PaliGemma, once for all prompts; `shortened` is for Qwen2.5-VL, prompt by
prompt, as its pictures are of any size.
"""

from __future__ import annotations

import sys
from typing import Any

import skimage.data
import tokenizers
import torch
import transformers as T
from PIL import Image

import tomesd.vit as tome
from tomesd.commands.common import Parser, UserError, first_line, guarded, ratio

PROGRAM = "examples/vlm.py"
PROMPT = "<image> what is this ?"


def shorten_prompts(model: Any, processor: Any, keep: float) -> None:
    """Makes LLaVA or PaliGemma read `keep` tokens of each picture, and its processor write as many places."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    keep = int(keep) if keep >= 1 else int(keep * patches)
    if not 1 <= keep <= patches:
        raise ValueError(f"there are {patches} tokens of a picture, of which {keep} cannot be kept")

    def reduce(module: Any, args: Any) -> Any:
        features = args[0]  # a class token may be among them
        return (tome.reduce(features, keep, prefix=features.shape[1] - patches).tokens,)

    model.model.multi_modal_projector.register_forward_pre_hook(reduce)
    if hasattr(processor, "image_seq_length"):  # PaliGemma
        processor.image_seq_length = keep
    else:  # LLaVA's counts the patches itself
        processor.num_additional_image_tokens += keep - patches
    # Half of them merge in the tower already; `tome.tune` would say in which layers.
    tome.apply_patch(model)
    model.r = (patches - keep) // (2 * vision.num_hidden_layers)


@torch.no_grad()
def shortened(model: Any, inputs: Any, keep: float) -> dict[str, torch.Tensor]:
    """What Qwen2.5-VL takes in place of its processor's inputs: a share `keep` of the tokens of each picture.

    A token that stays has the mean of its group, and its own position in the picture. Those that go are moved
    to the left, where padding is; columns that hold nothing else are cut off.
    """
    ids, sizes = inputs["input_ids"], inputs["image_grid_thw"]
    pictures = model.get_image_features(inputs["pixel_values"], sizes).pooler_output
    side = model.config.vision_config.spatial_merge_size  # so many patches are a token already
    positions, _ = model.model.get_rope_index(
        ids, inputs["mm_token_type_ids"], sizes, attention_mask=inputs["attention_mask"]
    )
    tokens, stays = [], []
    for picture, (_, rows, columns) in zip(pictures, sizes.tolist(), strict=True):
        reduced = tome.reduce(picture[None], keep, grid=(rows // side, columns // side))
        tokens.append(picture.index_copy(0, reduced.map.keep[0], reduced.tokens[0]))
        stays.append(picture.new_zeros(len(picture)).index_fill(0, reduced.map.keep[0], 1))
    places = ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(ids)
    embeds[places] = torch.cat(tokens).to(embeds.dtype)
    mask = inputs["attention_mask"].clone()
    mask[places] = torch.cat(stays).to(mask.dtype)
    order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    return {
        "inputs_embeds": embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])),
        "attention_mask": mask.gather(1, order),
        "position_ids": positions.gather(2, order.expand(3, -1, -1)),
    }


def tiny(select: str = "default") -> tuple[Any, Any]:
    """A LLaVA of random weights, and its processor: 64 patches of a picture of 32 pixels."""
    words = ["<pad>", "<image>", "<s>", "what", "is", "this", "?"]
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"additional_special_tokens": ["<image>"], "pad_token": "<pad>", "bos_token": "<s>"}
    processor = T.LlavaProcessor(
        T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        patch_size=4,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1,
    )
    size = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=3)
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**size, image_size=32, patch_size=4),
        text_config=T.LlamaConfig(**size, vocab_size=len(words)),
        image_token_index=1,
        vision_feature_select_strategy=select,
    )
    return T.LlavaForConditionalGeneration(config).eval(), processor


def number(text: str) -> float:
    """Tokens, or a share of them."""
    return int(text) if text.isdecimal() else ratio(text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--model", help="name on the hub or a folder, of LLaVA, PaliGemma or Qwen2.5-VL")
    parser.add_argument(
        "--keep", type=number, default=16, help="tokens of a picture, or a share of them (16)"
    )
    parser.add_argument("--image", help="a file (a photo of scikit-image)")
    parser.add_argument("--prompt", help="with the model's own marks of a picture and of whose turn it is")
    args = parser.parse_args(arguments)
    image = Image.open(args.image).convert("RGB") if args.image else Image.fromarray(skimage.data.chelsea())
    if args.model:
        try:
            processor = T.AutoProcessor.from_pretrained(args.model)
            model = T.AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").eval()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot get the model {args.model}: {first_line(error)}") from None
    else:
        model, processor = tiny()

    def read() -> Any:
        return processor(images=image, text=args.prompt or PROMPT, return_tensors="pt")

    try:
        inputs = plain = read()
        if "image_grid_thw" in plain:
            inputs = shortened(model, plain, args.keep)
        else:
            shorten_prompts(model, processor, args.keep)
            inputs = read()
    except ValueError as error:  # of a --prompt or a --keep that cannot be
        raise UserError(first_line(error)) from None
    lengths = plain["attention_mask"].shape[1], inputs["attention_mask"].shape[1]
    print(f"tokens of the prompt: {lengths[0]}, shortened {lengths[1]}")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(processor.batch_decode(answer, skip_special_tokens=True)[0])
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROGRAM, main))
