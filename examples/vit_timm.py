"""A classifier of timm, a third faster in one line.

python examples/vit_timm.py                  random weights, offline
python examples/vit_timm.py --pretrained     timm's weights from the hub
"""

import argparse

import timm

import tomesd.vit as tome

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--pretrained", action="store_true", help="timm's weights from the hub")
model = timm.create_model("vit_base_patch16_224", pretrained=parser.parse_args().pretrained)
speed = dict(device="cpu", runs=6, batch_size=8)

plain = tome.utils.benchmark(model, **speed)
tome.apply_patch(model)
# Tokens to merge in each of the 12 layers; the last form: 32 in the first, then fewer.
for r in (8, 16, (16, -1.0)):
    model.r = r
    print(f"r = {r}: {tome.utils.benchmark(model, **speed) / plain:.2f}x the images per second")
