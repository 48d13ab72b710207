"""The page's parts as HTML."""

from collections.abc import Sequence
from html import escape

import pandas as pd

from .choice import CHOSEN, Choice, RankedItem, Row, found_items
from .content import DemoContent

# The element that a click is meant for says what is done with which item, or with which place of the history.
CLICKS = """
element.addEventListener('click', event => {
  const target = event.target.closest('[data-action]');
  if (target) trigger('click', {action: target.dataset.action, number: Number(target.dataset.number)});
});
"""
PICTURES = ("https://", "http://", "data:image/")
CSS = """
.gradio-container { max-width: 1400px !important; }
.part { margin: 16px 0 6px; font-size: 15px; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 8px; }
.card, .ranked li, .chip, .cut { border: 1px solid var(--border-color-primary); border-radius: 8px; min-width: 0;
  background: var(--block-background-fill); color: var(--body-text-color); font: inherit; text-align: left; }
.card { padding: 6px; }
button.card, .chip, .cut { cursor: pointer; }
button:hover, button:focus-visible { border-color: var(--color-accent) !important; }
#blocked { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; font-size: 13px; padding: 4px 0; }
.chip, .cut { padding: 2px 8px; font-size: 12px; }
.picture { display: block; width: 100%; height: 48px; border-radius: 5px; object-fit: cover; margin-bottom: 4px;
  background: hsl(var(--hue) 45% 55%); }
.name { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden;
  font-size: 13px; line-height: 1.3; overflow-wrap: anywhere; }
.codes, .note { font-size: 12px; line-height: 1.3; opacity: .7; margin: 0; }
.note { padding: 4px 0; }
.lists { display: grid; grid-template-columns: minmax(310px, 2fr) repeat(var(--others), minmax(0, 1fr)); gap: 14px; }
.ranked { list-style: none; margin: 0; padding: 0; display: grid; gap: 4px; }
.ranked li { display: grid; grid-template-columns: 20px minmax(0, 1fr); gap: 8px; align-items: center;
  padding: 3px 6px; height: 46px; box-sizing: border-box; }
#ranked li { grid-template-columns: 20px 34px minmax(0, 1fr) auto auto; }
.ranked li.shared { border-color: var(--color-accent); }
.ranked .picture { height: 30px; margin: 0; }
.ranked .name { -webkit-line-clamp: 1; }
.number { text-align: right; font-variant-numeric: tabular-nums; font-size: 13px; }
.badge { border-radius: 4px; padding: 0 6px; margin-left: 6px; font-size: 12px; line-height: 1.3; font-weight: 400;
  background: var(--color-accent-soft); }
.scroll { overflow-x: auto; }
.rewards { border-collapse: collapse; font-size: 13px; }
.rewards th, .rewards td { padding: 4px 9px; border-bottom: 1px solid var(--border-color-primary); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; font-weight: 400; }
.rewards thead th { opacity: .7; }
.rewards th:first-child { text-align: left; position: sticky; left: 0; background: var(--body-background-fill); }
.rewards .first { border-left: 1px solid var(--border-color-primary); }
.rewards tr.chosen > * { font-weight: 600; }
.problem { border-left: 4px solid #c2410c; padding: 8px 12px; }
#history .cards, #catalogue .cards { max-height: 390px; overflow-y: auto; }
.html-container { padding: 0 !important; }
@media (max-width: 900px) {
  .lists { grid-template-columns: minmax(0, 1fr); }
  .ranked li { height: auto; min-height: 46px; }
  .ranked .name { -webkit-line-clamp: 2; }
  #history .cards, #catalogue .cards { grid-template-columns: none; grid-auto-flow: column; grid-auto-columns: 104px;
    overflow-x: auto; }
}
"""


def codes_of(content: DemoContent, item: int) -> str:
    """The item's semantic ID, its first one where it has several."""
    return "·".join(map(str, content.tokenizer.codes[item, : content.tokenizer.num_levels]))


def picture(content: DemoContent, item: int) -> str:
    """The item's picture, or else a tile whose colour is its first code: like items are of like colours."""
    url = content.items["image"].iloc[item]
    if isinstance(url, str) and url.startswith(PICTURES):
        return f'<img class="picture" src="{escape(url)}" alt="" loading="lazy" referrerpolicy="no-referrer">'
    tokenizer = content.tokenizer
    hue = 360 * int(tokenizer.codes[item, 0]) // tokenizer.codebook_sizes[0]
    return f'<span class="picture" style="--hue:{hue}"></span>'


def named(content: DemoContent, item: int, beside: str = "") -> str:
    """The item's name, and below it its codes and what stands beside them."""
    name = escape(content.items["name"].iloc[item])
    codes = f'<span class="codes">{codes_of(content, item)}</span>{beside}'
    return f'<span class="name" title="{name}">{name}</span>{codes}'


def button(content: DemoContent, kind: str, action: str, item: int, inner: str, place: int | None = None) -> str:
    """What can be clicked: the action is of the item, or of its place in the history."""
    title = escape(f"{action.capitalize()} {content.items['name'].iloc[item]}")
    number = item if place is None else place
    attributes = f'class="{kind}" data-action="{action}" data-number="{number}" title="{title}" aria-label="{title}"'
    return f'<button type="button" {attributes}>{inner}</button>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def card(content: DemoContent, item: int) -> str:
    return picture(content, item) + named(content, item)


def catalogue_cards(content: DemoContent, query: str) -> str:
    """What a query finds; a click adds to the history."""
    found = [button(content, "card", "add", item, card(content, item)) for item in found_items(content, query)]
    return f'<div class="cards">{"".join(found)}</div>' if found else note(f"No item is called {query!r}.")


def blocked_chips(content: DemoContent, blocked: Sequence[int]) -> str:
    """The blocked items; a click unblocks."""
    names = content.items["name"]
    chips = [button(content, "chip", "unblock", item, f"{escape(names.iloc[item])} ✕") for item in blocked]
    return f'<div id="blocked">Blocked: {" ".join(chips)}</div>' if chips else ""


def history_cards(content: DemoContent, row: Row) -> str:
    """What the encoder reads of a history, the latest first."""
    ids, read = row["history_item_ids"], content.recommender.model.config.history_items
    items = content.tokenizer.item_index(ids, unknown_items="skip").tolist()
    places = [place for place in range(len(ids))[::-1][:read] if items[place] >= 0]
    if not ids:
        return note("No items yet: click some of the catalogue.")
    told = note(f"{len(ids)} items, the latest first, of which {len(places)} are read. Click one to drop it.")
    shown = [button(content, "card", "drop", items[place], card(content, items[place]), place) for place in places]
    return f'{told}<div class="cards">{"".join(shown)}</div>'


def result(content: DemoContent, choice: Choice) -> str:
    """Session, rewards and lists of a choice."""
    changed = "" if choice.session == choice.likeliest else ' <span class="badge">changed by the settings</span>'
    items = {ranked.item for ranked in choice.ranked}
    session = "".join(f'<div class="card">{card(content, item)}</div>' for item in choice.session)
    others = "".join(
        f'<div><h3 class="part">{escape(name)}</h3>{_other_list(content, ranked, items)}</div>'
        for name, ranked in choice.baselines.items()
    )
    return "".join(
        [
            f'<h3 class="part">The session{changed}</h3>',
            f'<div id="session" class="cards">{session}</div>',
            '<h3 class="part">What the session is worth</h3>',
            note("The run has no reward model.")
            if choice.rewards is None
            else f'<div class="scroll" tabindex="0">{reward_table(choice.rewards)}</div>',
            f'<div class="lists" style="--others:{max(len(choice.baselines), 1)}"><div id="ranked">',
            f'<h3 class="part">OneRec, ranked list</h3>{_ranked_list(content, choice.ranked)}</div>{others}</div>',
            note("Scores are log-probabilities; was: the rank without the settings; framed: in OneRec's list too."),
        ]
    )


def _ranked_list(content: DemoContent, ranked: Sequence[RankedItem]) -> str:
    rows = []
    for rank, found in enumerate(ranked, 1):
        moved = "" if found.rank_before == rank else "new" if found.rank_before is None else f"was {found.rank_before}"
        badge = f'<span class="badge">{moved}</span>' if moved else ""
        rows.append(
            f'<li><span class="number">{rank}</span>{picture(content, found.item)}'
            f"<span>{named(content, found.item, badge)}</span>"
            f'<span class="number" title="log-probability">{found.score:.2f}</span>'
            f"{button(content, 'cut', 'block', found.item, 'Block')}</li>"
        )
    return f'<ol class="ranked">{"".join(rows)}</ol>'


def _other_list(content: DemoContent, ranked: Sequence[int], shared: set[int]) -> str:
    rows = [
        f'<li{" class=shared" if item in shared else ""}><span class="number">{rank}</span>'
        f"<span>{named(content, item)}</span></li>"
        for rank, item in enumerate(ranked, 1)
    ]
    return f'<ol class="ranked">{"".join(rows)}</ol>'


def reward_table(rewards: pd.DataFrame) -> str:
    """The table of [`session_rewards`]."""
    judges = rewards.columns.get_level_values(0)
    groups = "".join(
        f'<th class="first" colspan="{(judges == judge).sum()}">{escape(judge)}</th>' for judge in judges.unique()
    )
    first = [' class="first"' * (not again) for again in judges.duplicated()]
    names = "".join(f"<th{kind}>{escape(name)}</th>" for kind, (_, name) in zip(first, rewards.columns, strict=True))
    rows = []
    for name, values in rewards.iterrows():
        cells = "".join(
            f"<td{kind}>{'–' if pd.isna(value) else f'{value:.3f}'}</td>"
            for kind, value in zip(first, values, strict=True)
        )
        rows.append(f"<tr{' class=chosen' if name == CHOSEN else ''}><th>{escape(name)}</th>{cells}</tr>")
    head = f"<thead><tr><th></th>{groups}</tr><tr><th></th>{names}</tr></thead>"
    return f'<table class="rewards">{head}<tbody>{"".join(rows)}</tbody></table>'


def problem(error: Exception) -> str:
    return f'<p class="problem" role="alert">{escape(str(error))}</p>'
