"""`python scripts/bench COMMAND`: what compares tomesd with rivals, or needs data and weights of others."""

import sys

from tomesd.commands.common import dispatch

COMMANDS = {
    "speed": "`tomesd bench`, with the rivals",
    "quality": "`tomesd quality`, with the rivals and DINOv2",
    "plot": "`tomesd plot`, with the rivals",
    "vit": "speed of vision transformers against plain and ideal ones",
    "attention": "error of self-attention by each method, on real weights",
    "ops": "the hot operations against other ways to compute the same",
    "count": "FLOPs and memory of a step of a UNet, without computing it",
    "roofline": "a model of what a step would take on two GPUs, by data sheets",
    "caching": "DeepCache and an early end of guidance, alone and beside tomesd: error over operations",
    "training": "losses of a LoRA and of a whole fine-tune with merging, beside plain",
    "step-4k": "one step of the shipped model on the tokens of a 4K picture",
    "dense": "patches of DINOv2 with merged tokens beside plain ones",
    "eval-vit": "accuracy of DINOv2 with merged tokens on Fashion-MNIST",
    "matching": "which tokens of DINOv2 merge: error of features by ways to match them",
    "validate": "accuracy and speed of a classifier on a folder of pictures",
    "peers": "fetches the packages that tomesd is compared with",
    "dinov2": "writes real DINOv2 weights to a file, without a model hub",
}

if __name__ == "__main__":
    sys.exit(dispatch("python scripts/bench", COMMANDS, package=""))
