"""The page: its layout, and what its buttons call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.themes import Default

from ...methods.choice import DOWNSAMPLES
from ..common import UserError, out_of_memory
from ..generate import AMPLIFY
from ..options import METHODS
from .comparison import HEADERS, Settings, error_over_time
from .studio import FINEST, Cancelled, Studio
from .traced import Traced

THEME = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# gradio finds a parameter that has one by default.
PROGRESS = gr.Progress()
PROMPT = "red apple"
STEPS = 20
BOTH = "Plain | merged"
FIRST = (
    "Generate draws the picture plain and by the method, from the same noise. Each run that draws "
    "plain adds a point to *Error over time*."
)


def kindly(call: Callable[..., Any]) -> Callable[..., Any]:
    """Shows a mistake of the user as a sentence on the page, which else stays as it is."""

    @functools.wraps(call)
    def run(*args: Any) -> Any:
        try:
            return call(*args)
        except (UserError, ValueError) as error:  # diffusers raises the latter for what it cannot draw
            gr.Warning(str(error))
        except Cancelled:
            pass
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            gr.Warning("out of memory: try a smaller size, or to draw without plain beside it")
        return gr.skip()

    return run


def cells(lines: list[list[str]]) -> str:
    """A table in Markdown."""
    first, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|---" + "|--:" * (len(lines[0]) - 1) + "|", *rest])


def make_page(studio: Studio) -> gr.Blocks:
    """The page of a studio, to be launched."""
    presets = studio.presets()

    def read(*fields: Any) -> Settings:
        settings, notes = studio.settings(*fields)
        for note in notes:
            gr.Warning(note)
        return settings

    def line(method: str, ratio: float, levels: Any) -> str:
        try:
            return studio.settings(PROMPT, presets["Fast"]["size"], 1, method, ratio, levels, 0)[0].line
        except UserError as error:
            return f"# {error}"

    def tell(progress: gr.Progress) -> Any:
        return lambda label, step, steps: progress(((step - 1), steps), desc=label, unit="steps")

    @kindly
    def draw(request: gr.Request, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        runs, beside, *fields = given
        done = studio.compare(read(*fields), beside, tell(progress), request.session_hash or "")
        runs = [*runs, *filter(None, [done.run])]
        pair = (done.plain or done.merged).picture, done.merged.picture
        slider = gr.ImageSlider(pair, label="Merged alone" if done.plain is None else BOTH)
        text = f"{cells(done.table())}\n\n**{done.verdict()}**"
        return slider, done.difference, text, runs, error_over_time(runs), [list(run) for run in runs]

    @kindly
    def trace(request: gr.Request, progress: gr.Progress = PROGRESS, *fields: Any) -> Any:
        traced = studio.trace(read(*fields), tell(progress), request.session_hash or "")
        choices = gr.Dropdown(traced.blocks, value=traced.finest, interactive=True)
        steps = gr.Slider(maximum=traced.steps, value=traced.steps, interactive=traced.steps > 1)
        return traced, None, choices, steps, *traced.show(traced.finest, traced.steps)

    def show(traced: Traced | None, block: str, step: int, spot: Any) -> Any:
        return gr.skip() if traced is None else traced.show(block, int(step), spot)

    def click(traced: Traced | None, block: str, step: int, event: gr.SelectData) -> Any:
        if traced is None:
            return gr.skip()
        spot = traced.spot(block, *event.index)
        return spot, *traced.show(block, int(step), spot)

    def stop(request: gr.Request) -> None:
        gr.Info("Stopped." if studio.stop(request.session_hash or "") else "Nothing of yours is being drawn.")

    def leave(request: gr.Request) -> None:
        studio.stop(request.session_hash or "")

    page: gr.Blocks
    with gr.Blocks(title="tomesd", analytics_enabled=False) as page:
        runs, traced, spot = gr.State([]), gr.State(), gr.State()
        gr.Markdown("# tomesd\nThe same picture, drawn with the attention of fewer tokens.")
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                prompt = gr.Textbox(PROMPT, label="Prompt", lines=1)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=100)
                    cancel = gr.Button("Cancel", min_width=100)
                with gr.Row():
                    buttons = {name: gr.Button(name, size="sm", min_width=80) for name in presets}
                method = gr.Radio(
                    [(made.__name__, name) for name, made in METHODS.items()], value="merge", label="Method"
                )
                levels = gr.Dropdown(
                    [FINEST, *DOWNSAMPLES],
                    value=FINEST,
                    label="Levels",
                    info="where it works: up to this downsampling (max_downsample)",
                )
                # Not sliders: those have errors of their own for what is out of range.
                with gr.Row():
                    ratio = gr.Number(0.5, label="Ratio", step=0.05, min_width=90)
                    steps = gr.Number(STEPS, label="Steps", precision=0, min_width=90)
                with gr.Row():
                    size = gr.Textbox(presets["Fast"]["size"], label="Size", min_width=90)
                    seed = gr.Number(0, label="Seed", precision=0, min_width=90)
                beside = gr.Checkbox(True, label="Draw plain too, to compare")
            with gr.Column(scale=3):
                with gr.Tab("Compare"):
                    with gr.Row():
                        slider = gr.ImageSlider(label=BOTH, format="png", interactive=False)
                        difference = gr.Image(
                            label=f"Difference x{AMPLIFY}, white for none", format="png", interactive=False
                        )
                    figures = gr.Markdown(FIRST)
                with gr.Tab("Error over time"):
                    plot = gr.Plot(error_over_time([]), show_label=False, format="png")
                    table = gr.Dataframe(headers=HEADERS, label="Runs", interactive=False)
                with gr.Tab("What merged"):
                    look = gr.Button("Draw and trace")
                    with gr.Row():
                        block = gr.Dropdown([], label="Block", interactive=False, scale=3)
                        step = gr.Slider(1, 2, 1, step=1, label="Step", interactive=False, scale=2)
                    seen = gr.Image(label="Click a pixel", format="png", interactive=False)
                    words = gr.Markdown(
                        "Draw and trace notes, at each step, what each block merged. Then click the picture, "
                        "to see what merged with that pixel."
                    )
                code = gr.Code(
                    line("merge", 0.5, FINEST), language="python", label="The same in Python", lines=1
                )
        fields = [prompt, size, steps, method, ratio, levels, seed]
        one: Any = dict(concurrency_id="pipeline", concurrency_limit=1)
        drawing = gr.on(
            [generate.click, prompt.submit],
            draw,
            [runs, beside, *fields],
            [slider, difference, figures, runs, plot, table],
            show_progress_on=[slider, difference],
            **one,
        )
        tracing = look.click(
            trace, fields, [traced, spot, block, step, seen, words], show_progress_on=seen, **one
        )
        cancel.click(stop, cancels=[drawing, tracing], concurrency_limit=None)
        page.unload(leave)
        gr.on([method.change, ratio.change, levels.change], line, [method, ratio, levels], code, queue=False)
        for name, button in buttons.items():
            values = presets[name]
            button.click(
                lambda values=values: [*map(values.get, ("size", "method", "ratio", "levels", "beside"))],
                outputs=[size, method, ratio, levels, beside],
                queue=False,
            )
        gr.on(
            [block.input, step.input],
            show,
            [traced, block, step, spot],
            [seen, words],
            show_progress="hidden",
        )
        seen.select(click, [traced, block, step], [spot, seen, words], show_progress="hidden")
    return page
