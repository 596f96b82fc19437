"""The parts of the pipeline, and how its UNet grows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 16  # the longest caption is far shorter, and every token costs cross-attention time


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in which every word of the captions is one token."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate(alphabet + [c + "</w>" for c in alphabet])}
    words = Counter("".join(c if c.isalnum() else " " for c in " ".join(captions)).split())
    split = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(p for w, s in split.items() for p in pairwise(s) for _ in range(words[w]))
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))  # ties broken by name: the same vocabulary every time
        merges.append(best)
        vocab.setdefault("".join(best), len(vocab))
        for symbols in split.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids as the pipeline makes them."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """CLIP's text encoder, with heads 32 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_attention_heads=max(1, width // 32),
        num_hidden_layers=layers,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_vae(channels: list[int], resolution: int) -> AutoencoderKL:
    """Stable Diffusion's autoencoder, with a level for each number of channels."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=resolution,
        scaling_factor=1.0,  # vae.fold_latent_statistics() makes the latents unit variance
        mid_block_add_attention=False,  # lets training crops and drawing sizes differ
        force_upcast=False,
    )


def build_unet(
    channels: list[int], latent_size: int, text_width: int, heads: list[int] | None = None
) -> UNet2DConditionModel:
    """A Stable Diffusion UNet with attention at every resolution, the finest included."""
    return UNet2DConditionModel(
        sample_size=latent_size,
        block_out_channels=channels,
        down_block_types=["CrossAttnDownBlock2D"] * len(channels),
        up_block_types=["CrossAttnUpBlock2D"] * len(channels),
        layers_per_block=1,
        # diffusers calls the number of heads attention_head_dim; few heads at the finest level, where
        # attention over all positions is dear
        attention_head_dim=heads or [max(1, c // (64 if i == 0 else 32)) for i, c in enumerate(channels)],
        cross_attention_dim=text_width,
        norm_num_groups=16,
        use_linear_projection=True,
        time_embedding_dim=128,
        conv_in_kernel=1,  # 1x1 at both ends, so that grown() is exact
        conv_out_kernel=1,
    )


@torch.no_grad()
def grown(small: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with one level more outside, of the width of ``small``'s first, that starts as its equal.

    Of latents `x` of twice the side it gives what ``small`` gives of their 2x2 means, doubled in size. The
    new layers begin as identities, and have the details to learn.
    """
    config = small.config
    first, *rest = config.block_out_channels
    heads = config.attention_head_dim
    large = build_unet(
        [first, first, *rest], 2 * config.sample_size, config.cross_attention_dim, [heads[0], *heads]
    )
    weights = {}
    for name, value in small.state_dict().items():
        if name.startswith("down_blocks."):
            _, level, tail = name.split(".", 2)
            name = f"down_blocks.{int(level) + 1}.{tail}"
        weights[name] = value
    large.load_state_dict(weights, strict=False)

    outer_down, outer_up = large.down_blocks[0], large.up_blocks[-1]
    for module in [*outer_down.resnets, *outer_up.resnets]:
        nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(module.conv2.bias)
    for module in [*outer_down.attentions, *outer_up.attentions]:
        nn.init.zeros_(module.proj_out.weight)
        nn.init.zeros_(module.proj_out.bias)
    identity = torch.eye(first)
    n = config.in_channels
    large.conv_in.weight[:n] = identity[:n, :n, None, None]  # the latents travel in the first channels
    large.conv_in.bias[:n] = 0
    mean = torch.tensor([0.0, 0.5, 0.5])  # a stride of 2 with padding of 1 takes each pair so
    down = outer_down.downsamplers[0].conv
    down.weight.zero_()
    down.weight[:, :n] = small.conv_in.weight * torch.outer(mean, mean)
    down.bias.copy_(small.conv_in.bias)
    up = large.up_blocks[-2].upsamplers[0].conv
    up.weight.zero_()
    up.weight[:, :, 1, 1] = identity
    up.bias.zero_()
    for resnet in outer_up.resnets:  # of what comes from below and of the skip only the former
        resnet.conv_shortcut.weight.zero_()
        resnet.conv_shortcut.weight[:, :first, 0, 0] = identity
        resnet.conv_shortcut.bias.zero_()
    return large


def build_scheduler() -> DDIMScheduler:
    """DDIM with a last step of pure noise: without it pictures cannot have a white background."""
    return DDIMScheduler(
        beta_schedule="linear",  # noisier than Stable Diffusion's: a latent here is 2 x 2 pixels, not 8 x 8
        beta_start=0.0001,
        beta_end=0.02,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # not used with trailing spacing, but the pipeline warns about anything else
    )


@dataclass
class Parts:
    """Everything that is saved as the pipeline."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler

    def pipeline(self) -> StableDiffusionPipeline:
        """The parts put together, silent."""
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save(self, folder: Path) -> None:
        """Write the pipeline in half precision."""
        modules = (self.unet, self.text_encoder, self.vae)
        for m in modules:
            m.half()
        self.pipeline().save_pretrained(folder, safe_serialization=True)
        for m in modules:
            m.float()
        # For transformers 4: it reads vocab.json and merges.txt in place of tokenizer.json, and draws weights
        # at random that it does not find by the names that they had then. Version 5 reads these too.
        self.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
        weights = folder / "text_encoder" / "model.safetensors"
        named = {
            f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(weights).items()
        }
        save_file(named, weights, metadata={"format": "pt"})
        # transformers loads in the precision of this file, diffusers in float32: they have to agree
        config = folder / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
