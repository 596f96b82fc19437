"""How many images a model takes per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral

import torch
from torch import nn

from ..hosts.networks import checked
from ..maths.devices import synchronize
from ..methods import options
from ..tools.extras import need


def benchmark(
    model: nn.Module,
    device: torch.device | str | int = 0,
    input_size: tuple[int, int, int] = (3, 224, 224),
    batch_size: int = 64,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Measures the throughput of a model on random images. The model is moved to the device and to eval mode.

    Args:
        model: takes images `[batch_size, *input_size]`.
        device: where to run, `"cpu"` for instance; a number is that of a GPU.
        input_size: channels, height and width of an image.
        batch_size: images at once.
        runs: how often the model runs.
        throw_out: share of the runs, the first ones, that are not counted.
        use_fp16: run under autocast to float16 (bfloat16 on a CPU).
        verbose: show a progress bar and print the result.

    Returns:
        Images per second.

    Raises:
        ImportError: `verbose` without tqdm.
        TypeError: the model is no module, or an option of the wrong type.
        ValueError: fewer than one counted run, or a device that is not there.
    """
    model = checked(model)
    runs, batch_size = options.integer("runs", runs), options.integer("batch_size", batch_size)
    throw_out = options.number("throw_out", throw_out)
    options.boolean("use_fp16", use_fp16)
    options.boolean("verbose", verbose)
    if not isinstance(input_size, Sequence) or isinstance(input_size, str):
        raise options.wrong_type("input_size", "channels, height and width, as (3, 224, 224)", input_size)
    for side in input_size:
        options.integer(f"each of input_size {input_size}", side, least=1)
    try:
        device = torch.device(f"cuda:{device}" if isinstance(device, Integral) else device)
    except (TypeError, RuntimeError):
        raise options.wrong_type("device", 'a name such as "cpu", or the number of a GPU', device) from None
    try:  # before the model moves there
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError):
        raise ValueError(f'{device} cannot run anything here: pass device="cpu"') from None
    if not (0 <= throw_out < 1 and runs > 0 and batch_size > 0):
        raise ValueError(
            f"nothing to measure with runs={runs}, throw_out={throw_out}, batch_size={batch_size}"
        )
    warm_up = int(runs * throw_out)
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    model = model.eval().to(device)
    weights = next(model.parameters(), torch.empty(0)).dtype
    images = torch.rand(batch_size, *input_size, device=device).to(weights)
    shown: Callable[[Iterable[int]], Iterable[int]] = iter
    if verbose:
        shown = partial(need("tqdm", "verbose=True").tqdm, desc="Benchmarking")
    start = 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=use_fp16):
        for run in shown(range(runs)):
            if run == warm_up:
                synchronize(device)
                start = time.perf_counter()
            model(images)
        synchronize(device)
    throughput = (runs - warm_up) * batch_size / (time.perf_counter() - start)
    if verbose:
        print(f"Throughput: {throughput:.2f} im/s")
    return throughput
