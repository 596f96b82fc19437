"""`python -m tomesd quality`, also where torchvision's compiled part is of another build than torch."""

import sys

import torchvision_ops

from tomesd.__main__ import main

if __name__ == "__main__":
    torchvision_ops.define()
    sys.exit(main(["quality", *sys.argv[1:]]))
