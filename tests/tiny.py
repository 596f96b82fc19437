"""Real networks and pipelines of diffusers, made of tiny random parts; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers as D
import peers
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT = 32  # width of the text embedding


def unet(**changes) -> D.UNet2DConditionModel:
    """SD 1.5's topology with few channels: attention at downsample 1, 2, 4 and 8."""
    torch.manual_seed(0)
    config = dict(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32, 32, 32),
        attention_head_dim=4,
        cross_attention_dim=TEXT,
        norm_num_groups=8,
    )
    return D.UNet2DConditionModel(**{**config, **changes}).eval()


def small_unet(**changes) -> D.UNet2DConditionModel:
    """Two levels, attention at the finest and in the middle: for what needs no more."""
    config = dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return unet(**{**config, **changes})


def sdxl_unet(**changes) -> D.UNet2DConditionModel:
    """SDXL's topology: none at downsample 1, several blocks for each transformer, linear projections."""
    config = dict(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT,
        cross_attention_dim=2 * TEXT,
    )
    return unet(**{**config, **changes})


def refiner_unet() -> D.UNet2DConditionModel:
    """The SDXL refiner's topology: attention in the middle levels only, five time ids."""
    return sdxl_unet(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        projection_class_embeddings_input_dim=5 * 8 + TEXT,
    )


def motion_unet() -> D.UNetMotionModel:
    torch.manual_seed(0)
    return D.UNetMotionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        cross_attention_dim=TEXT,
        norm_num_groups=8,
    ).eval()


def unet3d() -> D.UNet3DConditionModel:
    torch.manual_seed(0)
    return D.UNet3DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT,
        norm_num_groups=8,
    ).eval()


def controlnet() -> D.ControlNetModel:
    return _awake(D.ControlNetModel.from_unet(unet()).eval())


def peer(name: str, alias: str | None = None):
    """Another package to compare with; skips the test where it cannot be fetched."""
    try:
        return peers.load(name, alias)
    except peers.Unavailable as error:
        pytest.skip(str(error))


def _awake(network: nn.Module) -> nn.Module:
    """Fills the layers that start as zeros, which would hide what happens before them."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def controlnet_union() -> D.ControlNetUnionModel:
    torch.manual_seed(0)
    network = D.ControlNetUnionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT,
        num_control_type=2,
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
        conditioning_channels=3,
        conditioning_embedding_out_channels=(8, 8),
    )
    return _awake(network.eval())


def controlnet_xs() -> D.UNetControlNetXSModel:
    torch.manual_seed(0)
    network = D.UNetControlNetXSModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        ctrl_block_out_channels=(8, 16),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(8, 8),
        upcast_attention=False,
    )
    return _awake(network.eval())


def sparse_controlnet() -> D.SparseControlNetModel:
    torch.manual_seed(0)
    network = D.SparseControlNetModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        norm_num_groups=8,
        attention_head_dim=4,
        motion_num_attention_heads=2,
        use_simplified_condition_embedding=True,
    )
    return _awake(network.eval())


def video_diffusion() -> D.UNetSpatioTemporalConditionModel:
    torch.manual_seed(0)
    return D.UNetSpatioTemporalConditionModel(
        sample_size=16,
        in_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        layers_per_block=1,
        cross_attention_dim=TEXT,
        num_attention_heads=(2, 4),
        num_frames=3,
    ).eval()


def i2vgen() -> D.I2VGenXLUNet:
    torch.manual_seed(0)
    return D.I2VGenXLUNet(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    ).eval()


def audioldm2() -> nn.Module:
    torch.manual_seed(0)
    return D.AudioLDM2UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=((None, TEXT, TEXT), (None, TEXT, TEXT)),
        attention_head_dim=4,
    ).eval()


def pixart() -> D.PixArtTransformer2DModel:
    torch.manual_seed(0)
    network = D.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        norm_num_groups=1,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=2,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )
    return _awake(network.eval())


def ldm() -> nn.Module:
    """A CompVis LatentDiffusion object's shape around the original UNetModel: `.model.diffusion_model`."""
    peer("ldm")
    from ldm.modules import attention
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    attention.XFORMERS_IS_AVAILBLE = False
    torch.manual_seed(0)
    network = UNetModel(
        image_size=16,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        attention_resolutions=(1, 2, 4),
        num_res_blocks=1,
        channel_mult=(1, 1, 1, 1),
        num_heads=2,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=TEXT,
        use_checkpoint=True,
        legacy=False,
    ).eval()
    model = nn.Module()
    model.model = nn.Module()
    model.model.diffusion_model = _awake(network)
    return model


@dataclass(frozen=True)
class Case:
    """A network and how to call it: `case(model, h, w, b, t)` gives its output for a latent image.

    Args:
        build: makes the network, with random weights, in eval mode.
        call: `call(model, x, text, t)` gives a tensor `[b, ...]` for latents `[b, 4, h, w]`, a text of
            `[b, 7, TEXT]` and a timestep, a tensor of one or of b.
        travels: whether its containers pass a dict on to attention, `carrier` in its row.
        keys: whether its self-attention takes keys of other tokens, `keys` in its row.
        bias: whether its self-attention takes a bias, `bias` in its row.
        plain: whether the network itself compiles to one graph and runs in bfloat16.
    """

    build: Callable[[], nn.Module]
    call: Callable[..., Tensor]
    travels: bool = True
    keys: bool = True
    bias: bool = True
    plain: bool = True

    def __call__(self, model: nn.Module, h=16, w=16, b=2, t=500) -> Tensor:
        return self.call(model, *inputs(h, w, b), t if isinstance(t, Tensor) else torch.tensor(t))


def inputs(h: int, w: int, b: int) -> tuple[Tensor, Tensor]:
    """The same samples whatever the batch size."""
    generator = torch.Generator().manual_seed(h * 1000 + w)
    sample = torch.randn(8, 4, h, w, generator=generator)
    return sample[:b], torch.randn(8, 7, TEXT, generator=generator)[:b]


def _unet(model, x, text, t):
    return model(x, t, encoder_hidden_states=text).sample


def _sdxl(ids):
    def call(model, x, text, t):
        added = dict(text_embeds=text[:, 0], time_ids=torch.ones(len(x), ids))
        return model(x, t, encoder_hidden_states=text.repeat(1, 1, 2), added_cond_kwargs=added).sample

    return call


def _control(model, x, text, t):
    image = torch.nn.functional.interpolate(x[:, :3], scale_factor=8)
    return torch.cat([y.flatten(1) for y in model(x, t, text, image, return_dict=False)[0]], 1)


def _union(model, x, text, t):
    image = torch.nn.functional.interpolate(x[:, :3], scale_factor=2)
    kind = torch.tensor([[1.0, 0.0]]).expand(len(x), -1)
    added = dict(text_embeds=text[:, 0], time_ids=torch.ones(len(x), 6), control_type=kind)
    downs, mid = model(x, t, text, [image], kind, [0], added_cond_kwargs=added, return_dict=False)
    return torch.cat([y.flatten(1) for y in (*downs, mid)], 1)


def _video(repeats):
    def call(model, x, text, t):
        frames = torch.stack([x, x.flip(-1), x.flip(-2)], 2)
        return model(frames, t, encoder_hidden_states=text.repeat_interleave(repeats, 0)).sample

    return call


def _xs(model, x, text, t):
    image = torch.nn.functional.interpolate(x[:, :3], scale_factor=2)
    return model(x, t, text, image).sample


def _sparse(model, x, text, t):
    frames = torch.stack([x, x.flip(-1), x.flip(-2)], 2)
    mask = x.new_ones(len(x), 1, 3, *x.shape[2:])
    text = text.repeat_interleave(3, 0)
    downs, mid = model(frames, t, text, frames, conditioning_mask=mask, return_dict=False)
    return torch.cat([y.flatten(1) for y in (*downs, mid)], 1).unflatten(0, (len(x), -1)).flatten(1)


def _video_diffusion(model, x, text, t):
    frames = torch.stack([x, x.flip(-1), x.flip(-2)], 1)
    return model(frames, t, text, torch.ones(len(x), 3)).sample


def _i2vgen(model, x, text, t):
    frames = torch.stack([x, x.flip(-1), x.flip(-2)], 2)
    return model(frames, t, torch.full((len(x),), 7), frames, text[:, 0], text).sample


def _audio(model, x, text, t):
    return model(x, t, text, encoder_hidden_states_1=text.flip(1)).sample


def _pixart(model, x, text, t):
    return model(x, text, t.expand(len(x))).sample


def _ldm(model, x, text, t):
    return model.model.diffusion_model(x, t.expand(len(x)), context=text)


CASES = {
    "sd": Case(unet, _unet),
    "sdxl": Case(sdxl_unet, _sdxl(6)),
    "refiner": Case(refiner_unet, _sdxl(5)),
    "controlnet": Case(controlnet, _control),
    "controlnet_union": Case(controlnet_union, _union),
    "controlnet_xs": Case(controlnet_xs, _xs),
    "sparse_controlnet": Case(sparse_controlnet, _sparse),
    "animatediff": Case(motion_unet, _video(3)),
    "unet3d": Case(unet3d, _video(1)),
    "svd": Case(video_diffusion, _video_diffusion, travels=False),
    "i2vgen": Case(i2vgen, _i2vgen),
    "audioldm2": Case(audioldm2, _audio),
    "pixart": Case(pixart, _pixart),
    "ldm": Case(ldm, _ldm, travels=False, bias=False, plain=False),
}


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every character is a token."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip_text(tokenizer: CLIPTokenizer, projection: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=TEXT,
        num_attention_heads=4,
        num_hidden_layers=3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=TEXT,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae() -> D.AutoencoderKL:
    torch.manual_seed(0)
    return D.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128,
    ).eval()


def sd(kind: type = D.StableDiffusionPipeline, **parts) -> D.DiffusionPipeline:
    tokenizer = clip_tokenizer()
    defaults = dict(
        vae=vae(),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=D.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
    )
    pipe = kind(**{**defaults, **parts}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(kind: type = D.StableDiffusionXLPipeline, **parts) -> D.DiffusionPipeline:
    tokenizer = clip_tokenizer()
    defaults = dict(
        vae=vae(),
        text_encoder=clip_text(tokenizer),
        text_encoder_2=clip_text(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=sdxl_unet(),
        scheduler=D.EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )
    pipe = kind(**{**defaults, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animatediff() -> D.AnimateDiffPipeline:
    pipe = D.AnimateDiffPipeline(
        vae=vae(),
        text_encoder=clip_text(clip_tokenizer()),
        tokenizer=clip_tokenizer(),
        unet=motion_unet(),
        motion_adapter=None,
        scheduler=D.DDIMScheduler(clip_sample=False, beta_schedule="linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_pipe() -> D.PixArtAlphaPipeline:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(letter), -8.0) for letter in range(33, 127)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=120)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT,
        d_kv=8,
        d_ff=2 * TEXT,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    pipe = D.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(config).eval(),
        vae=vae(),
        transformer=pixart(),
        scheduler=D.DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: D.DiffusionPipeline, prompt="a cat", seed=0, **call) -> Tensor:
    """The pipeline's latents (or `output_type`), 2 steps at 128 pixels unless told."""
    call = {"num_inference_steps": 2, "output_type": "latent", **call}
    generator = torch.Generator().manual_seed(seed)
    output = pipe(prompt, generator=generator, **call)
    return output.frames if hasattr(output, "frames") else output.images
