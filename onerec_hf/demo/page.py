"""The page's layout and what its parts do."""

from collections.abc import Mapping
from typing import Any

from .cards import CLICKS, CSS, blocked_chips, catalogue_cards, history_cards, problem, result
from .choice import Settings, choose, with_item, without_item
from .content import DemoContent

LISTED_USERS = 200  # any other can be typed
MOST_GUIDANCE = 16.0

Visit = Mapping[str, Any]  # a visitor's `row`, `blocked` items and `seed`


def clicked(content: DemoContent, visit: Visit, action: str, number: int) -> dict[str, Any]:
    """The visit after a click on what names this action, and an item or a place of the history."""
    blocked = visit["blocked"]
    if action == "add":
        item_id = content.tokenizer.item_ids[[number]].tolist()[0]
        conditions = len(content.recommender.model.config.history_feedback)
        return {**visit, "row": with_item(visit["row"], item_id, conditions)}
    if action == "drop":
        return {**visit, "row": without_item(visit["row"], number)}
    if action == "block":
        return {**visit, "blocked": [*blocked, number] if number not in blocked else blocked}
    return {**visit, "blocked": [item for item in blocked if item != number]}


def shown(content: DemoContent, visit: Visit, guidance_weight: float, temperature: float) -> tuple[str, str]:
    """HTML of the history, and of what is recommended, or why nothing is, under what is blocked."""
    settings = Settings(tuple(visit["blocked"]), guidance_weight, temperature, visit["seed"])
    try:
        results = result(content, choose(content, visit["row"], settings))
    except ValueError as error:
        results = problem(error)
    return history_cards(content, visit["row"]), blocked_chips(content, visit["blocked"]) + results


def optional_gradio():
    """The package, which the plain installation leaves out."""
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The demo needs gradio: pip install -c constraints.txt 'onerec_hf[demo]'.", name=error.name
        ) from None
    return gradio


def build_page(content: DemoContent, title: str):
    """The page, a `gradio.Blocks`: a visitor's history and settings, and what they give."""
    gr = optional_gradio()
    first = next(iter(content.user_ids), None)
    start = {"row": content.new_row() if first is None else content.user_row(first), "blocked": [], "seed": 0}

    def pick(user: str | None, visit: Visit, *settings: float) -> tuple:
        try:
            visit = {**visit, "row": content.user_row((user or "").strip())}
        except ValueError as error:
            return visit, *shown(content, visit, *settings)[:1], problem(error)
        return visit, *shown(content, visit, *settings)

    def clear(visit: Visit, *settings: float) -> tuple:
        visit = {**visit, "row": content.new_row()}
        return None, visit, *shown(content, visit, *settings)

    def click(visit: Visit, guidance_weight: float, temperature: float, event: gr.EventData) -> tuple:
        visit = clicked(content, visit, event.action, event.number)
        return visit, *shown(content, visit, guidance_weight, temperature)

    def draw(visit: Visit, *settings: float) -> tuple:
        visit = {**visit, "seed": visit["seed"] + 1}
        return visit, *shown(content, visit, *settings)

    clickable = {"js_on_load": CLICKS, "apply_default_css": False}
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        visit = gr.State(start)
        gr.Markdown(f"# {title}\nFrom a history of items to the next session and a ranked list.")
        with gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("## History")
                users = [*content.user_ids][:LISTED_USERS]
                label = f"User, one of {len(content.user_ids)}"
                user = gr.Dropdown(users, value=first, label=label, allow_custom_value=True, elem_id="user")
                history = gr.HTML(elem_id="history", **clickable)
                empty = gr.Button("Empty history", size="sm")
                gr.Markdown("## Catalogue")
                query = gr.Textbox(label="Words of the name, or an id", placeholder="all, the most popular first")
                catalogue = gr.HTML(catalogue_cards(content, ""), elem_id="catalogue", **clickable)
            with gr.Column(min_width=300, scale=3):
                gr.Markdown("## Recommended")
                with gr.Row():
                    guidance = gr.Slider(
                        *(0, MOST_GUIDANCE, 0),
                        step=0.5,
                        label="Guidance",
                        info="Weight of the reward model in the search for the session.",
                        visible=content.scorer is not None,
                        min_width=260,
                        elem_id="guidance",
                    )
                    temperature = gr.Slider(
                        *(0, 3, 0),
                        step=0.1,
                        label="Temperature",
                        info="Above 0 the list, and without guidance the session, is drawn.",
                        min_width=260,
                        elem_id="temperature",
                    )
                again = gr.Button("Draw again", size="sm")
                results = gr.HTML(elem_id="results", **clickable)
        settings, parts = [guidance, temperature], [history, results]
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        page.load(lambda *given: shown(content, *given), [visit, *settings], parts, **quiet)
        user.input(pick, [user, visit, *settings], [visit, *parts], **quiet)
        empty.click(clear, [visit, *settings], [user, visit, *parts], **quiet)
        again.click(draw, [visit, *settings], [visit, *parts], **quiet)
        for part in (history, catalogue, results):
            part.click(click, [visit, *settings], [visit, *parts], **quiet)
        query.change(
            lambda text: catalogue_cards(content, text), query, catalogue, trigger_mode="always_last", **quiet
        )
        for slider in settings:
            slider.change(
                lambda *given: shown(content, *given),
                [visit, *settings],
                parts,
                trigger_mode="always_last",
                **quiet,
            )
    return page


def launch_page(content: DemoContent, title: str, **options: Any) -> None:
    """Serves the page until it is interrupted; options are those of [`gradio.Blocks.launch`]."""
    page = build_page(content, title).queue(default_concurrency_limit=4)
    # Of fonts that are there: nothing is fetched.
    theme = optional_gradio().themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(css=CSS, theme=theme, footer_links=["gradio"], **options)
